//! A way to a server, which can be cut.

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Goes from an address of its own to a server.
pub(crate) struct Link {
    pub(crate) address: String,
    open: watch::Sender<bool>,
}

impl Link {
    /// An open one to `server`.
    pub(crate) async fn to(server: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address").to_string();
        let (open, is_open) = watch::channel(true);
        tokio::spawn(async move {
            while let Ok((here, _)) = listener.accept().await {
                tokio::spawn(carry(here, server.clone(), is_open.clone()));
            }
        });
        Self { address, open }
    }

    /// Cuts it, connections and all.
    pub(crate) fn cut(&self) {
        self.open.send_replace(false);
    }

    /// Mends it.
    pub(crate) fn mend(&self) {
        self.open.send_replace(true);
    }
}

async fn carry(mut here: TcpStream, server: String, mut open: watch::Receiver<bool>) {
    let carried = async {
        let mut there = TcpStream::connect(server).await?;
        copy_bidirectional(&mut here, &mut there).await
    };
    tokio::select! {
        biased;
        _ = open.wait_for(|open| !open) => {}
        _ = carried => {}
    }
}
