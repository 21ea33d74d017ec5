//! A small blocking HTTP/1.1 client, for etcd's JSON gateway, `/metrics` and admin endpoints.

use std::io::{Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use crate::{Error, Result, Tried};

/// How long connecting, and each read or write, may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The largest answer that is read.
const ANSWER_BYTES_MAX: u64 = 64 << 20;

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The body as text; broken UTF-8 is replaced.
    pub body: String,
}

/// `GET http://{address}{path}`.
///
/// # Errors
/// When the server cannot be reached or does not speak HTTP. Any status is an answer.
pub fn get(address: impl ToSocketAddrs, path: &str) -> Result<Answer> {
    request("GET", address, path, "")
}

/// One request with a JSON body; an empty body is sent as none.
///
/// # Errors
/// When the server cannot be reached or does not speak HTTP. Any status is an answer.
pub fn request(
    method: &str,
    address: impl ToSocketAddrs,
    path: &str,
    body: &str,
) -> Result<Answer> {
    let what = || format!("{method} {path}");
    let address = address
        .to_socket_addrs()
        .tried(what)?
        .next()
        .ok_or_else(|| Error::Answer {
            what: what(),
            answer: "no such host".to_owned(),
        })?;
    let what = || format!("{method} http://{address}{path}");
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT).tried(what)?;
    stream.set_read_timeout(Some(TIMEOUT)).tried(what)?;
    stream.set_write_timeout(Some(TIMEOUT)).tried(what)?;
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .tried(what)?;
    let mut bytes = Vec::new();
    stream
        .take(ANSWER_BYTES_MAX)
        .read_to_end(&mut bytes)
        .tried(what)?;
    parse(&bytes).ok_or_else(|| Error::Answer {
        what: what(),
        answer: String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).into_owned(),
    })
}

/// Splits an answer into status and body; `None` when it is not HTTP.
fn parse(bytes: &[u8]) -> Option<Answer> {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&bytes[..end]).ok()?;
    let mut lines = head.split("\r\n");
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let chunked = lines.any(|line| {
        let line = line.to_ascii_lowercase();
        line.starts_with("transfer-encoding:") && line.ends_with("chunked")
    });
    let body = &bytes[end + 4..];
    let body = if chunked {
        dechunk(body)?
    } else {
        body.to_vec()
    };
    Some(Answer {
        status,
        body: String::from_utf8_lossy(&body).into_owned(),
    })
}

/// Joins the chunks of a chunked body; `None` when one is cut short.
fn dechunk(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = rest.windows(2).position(|two| two == b"\r\n")?;
        let size = std::str::from_utf8(&rest[..line]).ok()?;
        let size = usize::from_str_radix(size.split(';').next()?.trim(), 16).ok()?;
        rest = &rest[line + 2..];
        if size == 0 {
            return Some(body);
        }
        body.extend_from_slice(rest.get(..size)?);
        rest = rest.get(size + 2..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_and_chunked_bodies_are_read() {
        let plain = parse(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno").unwrap();
        assert_eq!((plain.status, plain.body.as_str()), (404, "no"));
        let chunked = parse(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nA;x=1\r\n0123456789\r\n0\r\n\r\n",
        )
        .unwrap();
        assert_eq!(chunked.body, "abc0123456789");
    }

    #[test]
    fn a_cut_chunk_is_not_an_answer() {
        assert!(dechunk(b"5\r\nabc").is_none());
        assert!(parse(b"SSH-2.0").is_none());
    }
}
