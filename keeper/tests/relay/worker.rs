//! A small daemon in a process of its own, to be killed.
//!
//! `worker SOCKET connect`: connects and prints the outcome.
//! `worker SOCKET hold FILE`: watches FILE if it is not watched yet, prints each event, answers none.
//! `worker SOCKET leave FILE`: watches FILE, closes its connection and lives on.
//! `worker SOCKET serve FILE`: the same, and fills and answers; connects again when it loses its keeper.

use crate::support::{Client, fill};
use skimmer_keeper::client::{Command, Keeper, KeeperError, Notice};
use std::fs::File;
use std::path::Path;
use std::time::Duration;

pub(crate) fn main(args: &[String]) {
    let (socket, mode) = (Path::new(&args[0]), args[1].as_str());
    let (keeper, welcome) = match Keeper::connect(socket) {
        Ok(connected) => connected,
        Err(error) => {
            println!("{error}");
            return;
        }
    };
    let mut client = Client(keeper);
    if mode == "connect" {
        println!("connected");
        return;
    }
    let writer = match welcome.files.into_iter().next() {
        Some(held) => File::from(held.fd),
        None => {
            let writer = File::options().read(true).write(true).open(&args[2]).unwrap();
            assert_eq!(client.watch(7, "the blob", &writer), 0);
            writer
        }
    };
    if mode == "leave" {
        drop(client);
        println!("left");
        loop {
            std::thread::park();
        }
    }
    println!("watching");
    // A daemon that answers late has more to lose when it dies.
    for turn in 0u64.. {
        let (event, offset, count) = match client.try_next() {
            Ok(Notice::Event { event, offset, count, .. }) => (event, offset, count),
            Ok(Notice::Stale { .. }) => continue,
            Ok(other) => panic!("{other:?} instead of an event"),
            Err(_) if mode == "serve" => {
                client = loop {
                    match Keeper::connect(socket) {
                        Ok((keeper, _)) => break Client(keeper),
                        // Killed once more before it could say anything.
                        Err(KeeperError::Closed) => {}
                        Err(error) => panic!("{error}"),
                    }
                };
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        if mode == "hold" {
            println!("event {offset}");
            continue;
        }
        if turn % 3 == 0 {
            std::thread::sleep(Duration::from_micros(500));
        }
        fill(&writer, offset, count);
        // A keeper that is gone by now asks again.
        let _ = client.0.send(Command::Answer { event, result: Ok(()) });
    }
}
