//! Who does not begin to speak HTTP/2 is dropped, and holds up nobody.

use super::*;

/// The most connections that may be silent; the constant of `incoming`.
const SILENT_MAX: usize = 256;

async fn call(port: u16) -> TcpStream {
    TcpStream::connect(("127.0.0.1", port)).await.unwrap()
}

/// Waits until the other side has hung up.
async fn is_dropped(stream: &mut TcpStream) {
    let heard = patiently(stream.read(&mut [0; 1])).await;
    assert!(matches!(heard, Ok(0) | Err(_)), "{heard:?}");
}

#[tokio::test]
async fn silent_connections_make_room_for_those_that_speak() {
    let port = echo(None).await;
    let mut early = call(port).await;
    say(&mut early).await.unwrap();
    let mut silent = Vec::new();
    for _ in 0..SILENT_MAX + 40 {
        silent.push(call(port).await);
    }
    say(&mut call(port).await).await.unwrap();
    say(&mut early).await.unwrap();
    for oldest in &mut silent[..40] {
        is_dropped(oldest).await;
    }
    say(silent.last_mut().unwrap()).await.unwrap();
}

#[tokio::test]
async fn who_says_half_a_preface_and_no_more_is_dropped_in_time() {
    let port = echo(None).await;
    let mut half = call(port).await;
    half.write_all(&WORD[..12]).await.unwrap();
    tokio::time::pause();
    is_dropped(&mut half).await;
}

#[tokio::test]
async fn who_says_something_else_is_dropped_at_once() {
    let port = echo(None).await;
    let mut web = call(port).await;
    web.write_all(b"P").await.unwrap();
    web.write_all(b"OST / HTTP/1.1\r\n").await.unwrap();
    is_dropped(&mut web).await;
}

#[tokio::test]
async fn a_preface_may_come_in_pieces() {
    let port = echo(None).await;
    let mut slow = call(port).await;
    slow.set_nodelay(true).unwrap();
    for byte in WORD {
        slow.write_all(&[*byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    let mut heard = [0; WORD.len()];
    patiently(slow.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, WORD);
}
