//! Words, addresses and titles out of numbers.

use super::rows::mix;

const LATIN: [&str; 40] = [
    "ka", "ro", "mi", "te", "lo", "na", "vi", "su", "pe", "do", "ra", "li", "go", "ma", "ze", "bu",
    "ti", "no", "sa", "ke", "pro", "sta", "dom", "tor", "ver", "net", "kin", "mar", "shop", "auto",
    "ski", "nik", "len", "grad", "bor", "tel", "foto", "inf", "avi", "zak",
];

const CYRILLIC: [&str; 40] = [
    "ка", "ро", "ми", "те", "ло", "на", "ви", "су", "пе", "до", "ра", "ли", "го", "ма", "зе", "бу",
    "ти", "но", "са", "ке", "про", "ста", "дом", "тор", "вер", "нет", "кин", "мар", "ник", "авто",
    "ский", "ние", "лен", "град", "бор", "тел", "фото", "инф", "ость", "зак",
];

fn word(out: &mut String, syllables: &[&str; 40], seed: u64) {
    let mut left = mix(seed);
    for _ in 0..2 + left % 3 {
        left = mix(left);
        out.push_str(syllables[(left % 40) as usize]);
    }
}

/// So many Cyrillic words, with spaces between them.
pub(super) fn words(out: &mut String, seed: u64, count: u64) {
    for i in 0..count {
        if i > 0 {
            out.push(' ');
        }
        word(out, &CYRILLIC, seed ^ mix(i));
    }
}

/// The name of a site.
pub(super) fn host(out: &mut String, site: u64) {
    word(out, &LATIN, site ^ 0x51);
    out.push_str([".ru", ".ru", ".ru", ".com", ".ua", ".net"][(mix(site) % 6) as usize]);
}

/// Whether a page is one of the few that have to do with Google.
fn about_google(site: u64, page: u64) -> bool {
    mix(site.rotate_left(17) ^ page).is_multiple_of(3000)
}

/// The address of a page of a site.
pub(super) fn url(out: &mut String, site: u64, page: u64) {
    let seed = mix(site ^ 0x7A11) ^ page;
    out.push_str("http://");
    host(out, site);
    out.push('/');
    // Pages of a site lie in few sections.
    word(out, &LATIN, mix(site) ^ (page % 7));
    for i in 0..mix(seed) % 3 {
        out.push('/');
        word(out, &LATIN, seed ^ (i + 2));
    }
    if about_google(site, page) {
        out.push_str("?from=http://www.google.com/search&q=");
        word(out, &LATIN, seed ^ 9);
    } else if !page.is_multiple_of(3) {
        out.push_str([".html?id=", "/index.php?showalbum=", "&page="][(page % 3) as usize]);
        out.push_str(&(mix(seed) % 1_000_000_000).to_string());
    }
}

/// The title of a page.
pub(super) fn title(out: &mut String, site: u64, page: u64) {
    if about_google(site, page) {
        out.push_str("Google ");
    }
    words(out, mix(site ^ page.rotate_left(9)), 3 + page % 6);
    out.push_str(" - ");
    host(out, site);
}

/// FNV-1a: what stands in the columns of hashes.
pub(super) fn hash(text: &str) -> i64 {
    let folded = text.bytes().fold(0xCBF2_9CE4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
    });
    folded as i64
}
