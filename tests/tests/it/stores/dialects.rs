//! What stores of other makes do with etags, conditions and ranges.

use stoa_origin::{ErrorKind, OriginLimits};
use stoa_tests::s3::{Conditions, EtagStyle, Habits};

use super::{QUERY, Shop, table};

/// Every dialect that a client meets, and whether its contents can be told apart.
fn dialects() -> Vec<(Habits, bool)> {
    use Conditions::*;
    use EtagStyle::*;
    let dialect = |list_etags, get_etags, conditions| Habits {
        list_etags,
        get_etags,
        conditions,
        ..Habits::default()
    };
    vec![
        (dialect(Quoted, Quoted, Checked), true),
        // The server checks as strictly as the standard says: unquoted it never matches.
        (dialect(Bare, Quoted, Checked), true),
        (dialect(Bare, Bare, Checked), true),
        (dialect(Bare, Bare, Ignored), true),
        (dialect(Quoted, Quoted, Unquoted), true),
        (dialect(Bare, Quoted, Unquoted), true),
        (dialect(Quoted, Quoted, Refused), true),
        (dialect(Quoted, Quoted, Ignored), true),
        (dialect(Missing, Quoted, Checked), true),
        (dialect(Quoted, Missing, Checked), true),
        (dialect(Weak, Weak, Checked), true),
        (dialect(Quoted, Weak, Ignored), true),
        // Nothing in these answers says what they are.
        (dialect(Quoted, Missing, Ignored), false),
        (dialect(Quoted, Missing, Refused), false),
        (dialect(Missing, Missing, Checked), false),
    ]
}

/// A user's bucket lies on a store of another make: layouts are made and loaded, queries answered
/// cold and hot; or one message says what is wrong with the store, at once.
#[test]
fn stores_of_every_make_are_read_or_named() {
    for (habits, is_readable) in dialects() {
        let shop = Shop::open();
        let expected = shop.two_files();
        shop.s3.set_habits(habits.clone());
        let created = shop.stoa(&["layout", "create", "s3.t", "--location", "s3://wares/t/"]);
        if !is_readable {
            assert_eq!(created.code, Some(2), "{habits:?}: {created:?}");
            assert!(created.stderr.contains("etag"), "{habits:?}: {created:?}");
            assert!(!created.stderr.contains("changed"), "{created:?}");
            let asked = shop.s3.counts().reads();
            assert!(asked <= 12, "{habits:?}: {asked} requests");
            continue;
        }
        assert_eq!(created.code, Some(0), "{habits:?}: {created:?}");
        assert_eq!(shop.ask(QUERY), expected, "{habits:?}, cold");
        shop.ok(&["load", "s3.t:1"]);
        shop.s3.forget();
        assert_eq!(shop.ask(QUERY), expected, "{habits:?}, hot");
        assert_eq!(shop.s3.counts().gets(), 0, "{habits:?}");
    }
}

/// An object is overwritten under a reader's eyes, on a store of every make: never are the new
/// bytes taken for the old content, nor is anything else said than that it has changed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_overwritten_object_is_noticed_on_every_make() {
    for (habits, is_readable) in dialects() {
        // Whether the first thing that is asked of the store is about the old or the new content.
        for reads_before in [true, false] {
            let shop = Shop::open();
            let old: Vec<u8> = (0..200).collect();
            shop.s3.put("wares", "t/a", &old).unwrap();
            shop.s3.set_habits(habits.clone());
            let origin = shop.origin(OriginLimits::default());
            let Ok(listed) = origin.list(&table()).await else {
                assert!(!is_readable, "{habits:?}");
                continue;
            };
            let object = &listed[0].identity;
            let range = std::slice::from_ref(&(10..20));
            if reads_before {
                match origin.read(object, range).await {
                    Ok(bytes) => assert_eq!(bytes[0], old[10..20], "{habits:?}"),
                    Err(error) => {
                        assert!(!is_readable, "{habits:?}: {error}");
                        assert_eq!(error.kind(), ErrorKind::Config, "{habits:?}: {error}");
                    }
                }
            }
            let new: Vec<u8> = (0..200).rev().collect();
            shop.s3.put("wares", "t/a", &new).unwrap();
            let error = origin.read(object, range).await.unwrap_err();
            let expected = match is_readable {
                true => ErrorKind::Changed,
                false => ErrorKind::Config,
            };
            assert_eq!(error.kind(), expected, "{habits:?}: {error}");
            let now = origin.list(&table()).await.unwrap();
            if is_readable {
                let bytes = origin.read(&now[0].identity, range).await.unwrap();
                assert_eq!(bytes[0], new[10..20], "{habits:?}");
            }
            assert_eq!(origin.counters().retries, 0, "{habits:?}");
        }
    }
}

/// A web server that knows no ranges would send a file for every chunk.
#[test]
fn a_store_that_ignores_ranges_is_named_and_not_asked_again() {
    let shop = Shop::open();
    shop.two_files();
    shop.s3.set_habits(Habits {
        ignores_ranges: true,
        ..Habits::default()
    });
    let created = shop.stoa(&["layout", "create", "s3.t", "--location", "s3://wares/t/"]);
    assert_eq!(created.code, Some(2), "{created:?}");
    assert!(
        created.stderr.contains("cannot be read in parts"),
        "{created:?}"
    );
    assert!(shop.s3.counts().gets() <= 2, "{:?}", shop.s3.counts());
}

/// Somebody forgets that plain HTTP needs consent: that is no fault of the network.
#[test]
fn plain_http_without_consent_is_a_mistake_of_the_configuration() {
    let shop = Shop::open();
    shop.two_files();
    shop.configure("");
    let created = shop.stoa(&["layout", "create", "s3.t", "--location", "s3://wares/t/"]);
    assert_eq!(created.code, Some(2), "{created:?}");
    assert!(created.stderr.contains("allow_http = true"), "{created:?}");
    assert_eq!(shop.s3.counts().reads(), 0);
}
