//! A tiny HTTP server, with which the smoke tests look at the cluster from within a pod. Not part of the product.
//!
//! `/` gives the pod's name, `/file/PATH` a file of the pod, `/get/HOST:PORT/PATH` what another server answers
//! (one new connection, name looked up by the pod's resolver), `/metrics` one gauge.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

/// The largest answer that is handed on, in bytes.
const LIMIT: u64 = 64 * 1024;

fn main() -> io::Result<()> {
    let listener = TcpListener::bind("0.0.0.0:8080")?;
    for stream in listener.incoming().flatten() {
        std::thread::spawn(move || serve(&stream));
    }
    Ok(())
}

fn serve(mut stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut reader = BufReader::new(stream.take(LIMIT));
    let mut line = String::new();
    reader.read_line(&mut line)?;
    // The rest of the head is read too: closing with unread bytes would reset the connection.
    let mut header = String::from("-");
    while !header.trim().is_empty() {
        header.clear();
        reader.read_line(&mut header)?;
    }
    let (status, body) = match answer(line.split(' ').nth(1).unwrap_or("/")) {
        Ok(body) => ("200 OK", body),
        Err(error) => ("502 Bad Gateway", format!("{error}\n")),
    };
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\ncontent-type: text/plain\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
    )
}

fn answer(target: &str) -> io::Result<String> {
    match target {
        "/" => Ok(std::env::var("HOSTNAME").unwrap_or_default()),
        "/metrics" => Ok("# TYPE probe_up gauge\nprobe_up 1\n".into()),
        _ => match (target.strip_prefix("/file/"), target.strip_prefix("/get/")) {
            (Some(path), _) => std::fs::read_to_string(Path::new("/").join(path)),
            (_, Some(url)) => get(url),
            _ => Err(io::Error::other("unknown path")),
        },
    }
}

fn get(url: &str) -> io::Result<String> {
    let (host, path) = url.split_once('/').unwrap_or((url, ""));
    let mut stream = TcpStream::connect(host)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET /{path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.take(LIMIT).read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(|| io::Error::other("no HTTP"))?;
    if head.split(' ').nth(1) == Some("200") {
        Ok(body.to_owned())
    } else {
        Err(io::Error::other(head.to_owned()))
    }
}
