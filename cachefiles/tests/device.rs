//! Device, tokens and objects against a stand-in for the kernel.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use rustix::io::Errno;
use skimmer_cachefiles::testing::{FakeKernel, Reply};
use skimmer_cachefiles::{
    AnswerError, BindOptions, Device, DeviceError, Object, ObjectId, OpenToken, ReadToken, Request,
};
use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::OwnedFd;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);
const VOLUME: &str = "erofs,skimmer";

fn reply(kernel: &FakeKernel) -> Reply {
    kernel.next_reply(PATIENCE).unwrap().expect("an answer")
}

fn silent(kernel: &FakeKernel) -> bool {
    kernel.next_reply(Duration::ZERO).unwrap().is_none()
}

fn open(device: &mut Device) -> OpenToken {
    match device.next_request().unwrap() {
        Some(Request::Open(token)) => token,
        other => panic!("{other:?}"),
    }
}

fn read(device: &mut Device) -> ReadToken {
    match device.next_request().unwrap() {
        Some(Request::Read(token)) => token,
        other => panic!("{other:?}"),
    }
}

/// An accepted object, and the file behind it.
fn object(kernel: &FakeKernel, device: &mut Device, id: u32, size: u64) -> (Object, File) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size.next_multiple_of(4096)).unwrap();
    let msg_id = kernel.open(id, VOLUME, "blob", file.try_clone().unwrap()).unwrap();
    let object = open(device).accept(size).unwrap();
    assert_eq!(reply(kernel), Reply::Copen { msg_id, size: i64::try_from(size).unwrap() });
    (object, file)
}

#[test]
fn nothing_waits_at_first() {
    let (_kernel, mut device) = FakeKernel::new().unwrap();
    assert!(device.next_request().unwrap().is_none());
}

#[test]
fn a_miss_from_open_to_close() {
    let (kernel, mut device) = FakeKernel::new().unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len(65_536).unwrap();
    let open_id = kernel.open(3, VOLUME, "blob", file.try_clone().unwrap()).unwrap();
    let token = open(&mut device);
    assert_eq!((token.volume_key(), token.cookie_key()), (VOLUME.as_bytes(), &b"blob"[..]));
    assert_eq!((token.object(), token.msg_id()), (ObjectId(3), open_id));
    assert!(silent(&kernel));
    let object = token.accept(65_000).unwrap();
    assert_eq!((object.id(), object.size()), (ObjectId(3), 65_000));
    assert_eq!(reply(&kernel), Reply::Copen { msg_id: open_id, size: 65_000 });
    let flags = rustix::io::fcntl_getfd(&object).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    assert_eq!(object.present().unwrap(), []);

    let read_id = kernel.read(3, 4096, 8192).unwrap();
    let token = read(&mut device);
    assert_eq!((token.object(), token.offset(), token.len()), (ObjectId(3), 4096, 8192));
    object.write_all_at(&[7; 8192], 4096).unwrap();
    assert!(silent(&kernel));
    token.complete().unwrap();
    assert_eq!(reply(&kernel), Reply::ReadComplete { msg_id: read_id, object_id: 3 });
    assert!(kernel.waiting().is_empty());
    assert_eq!(object.present().unwrap(), std::slice::from_ref(&(4096..12_288)));
    let mut back = Vec::new();
    (&file).rewind().unwrap();
    (&file).read_to_end(&mut back).unwrap();
    assert_eq!(back[4096..12_288], [7; 8192]);

    kernel.close(3).unwrap();
    assert!(matches!(device.next_request(), Ok(Some(Request::Close { object: ObjectId(3) }))));
    drop(object);
    assert!(silent(&kernel), "CLOSE has no answer");
}

#[test]
fn misaligned_writes_are_refused() {
    let (kernel, mut device) = FakeKernel::new().unwrap();
    let (object, _file) = object(&kernel, &mut device, 1, 65_536);
    for (offset, len) in [(512, 4096), (0, 100), (4097, 1)] {
        let error = object.write_all_at(&vec![1; len], offset).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::INVAL.raw_os_error()));
    }
    assert_eq!(object.present().unwrap(), []);
}

#[test]
fn a_rejected_open_closes_its_descriptor_after_the_answer() {
    let (kernel, mut device) = FakeKernel::new().unwrap();
    let (read_end, write_end) = std::io::pipe().unwrap();
    let msg_id = kernel.open(1, VOLUME, "unknown", File::from(OwnedFd::from(write_end))).unwrap();
    open(&mut device).reject(Errno::NOENT).unwrap();
    assert_eq!(reply(&kernel), Reply::Copen { msg_id, size: -2 });
    assert_eq!(read_all(read_end), 0, "no writer is left");
    // A READ of it would find nobody.
    kernel.read(1, 0, 4096).unwrap();
    assert!(matches!(device.next_request(), Err(DeviceError::UnknownObject { object: ObjectId(1), .. })));
}

fn read_all(mut pipe: std::io::PipeReader) -> usize {
    let mut bytes = Vec::new();
    pipe.read_to_end(&mut bytes).unwrap()
}

#[test]
fn dropped_tokens_answer_with_failure() {
    let (kernel, mut device) = FakeKernel::new().unwrap();
    let (read_end, write_end) = std::io::pipe().unwrap();
    let msg_id = kernel.open(1, VOLUME, "blob", File::from(OwnedFd::from(write_end))).unwrap();
    drop(open(&mut device));
    assert_eq!(reply(&kernel), Reply::Copen { msg_id, size: -5 });
    assert_eq!(read_all(read_end), 0);

    let (object, _file) = object(&kernel, &mut device, 2, 4096);
    let msg_id = kernel.read(2, 0, 4096).unwrap();
    drop(read(&mut device));
    assert_eq!(reply(&kernel), Reply::ReadComplete { msg_id, object_id: 2 });
    assert_eq!(object.present().unwrap(), [], "nothing was written: the reader gets EIO");
    let msg_id = kernel.read(2, 0, 4096).unwrap();
    read(&mut device).fail().unwrap();
    assert_eq!(reply(&kernel), Reply::ReadComplete { msg_id, object_id: 2 });
    // Only this one stays, for a successor.
    let msg_id = kernel.read(2, 0, 4096).unwrap();
    read(&mut device).leave_pending();
    assert!(silent(&kernel));
    assert_eq!(kernel.waiting(), [(msg_id, 2)]);
}

#[test]
fn a_token_does_not_keep_a_closed_object_alive() {
    let (kernel, mut device) = FakeKernel::new().unwrap();
    let (read_end, write_end) = std::io::pipe().unwrap();
    kernel.open(1, VOLUME, "blob", File::from(OwnedFd::from(write_end))).unwrap();
    let object = open(&mut device).accept(4096).unwrap();
    reply(&kernel);
    kernel.read(1, 0, 4096).unwrap();
    kernel.read(1, 0, 4096).unwrap();
    let (first, second) = (read(&mut device), read(&mut device));
    drop(object);
    assert_eq!(read_all(read_end), 0, "its descriptor is closed");
    assert!(matches!(first.complete(), Err(AnswerError::Closed { object: ObjectId(1), .. })));
    drop(second);
    assert!(silent(&kernel));
}

#[test]
fn a_read_the_kernel_gave_up_is_an_error_and_no_more() {
    let (kernel, mut device) = FakeKernel::new().unwrap();
    let (_object, _file) = object(&kernel, &mut device, 1, 4096);
    kernel.read(1, 0, 4096).unwrap();
    let token = read(&mut device);
    kernel.close(1).unwrap();
    assert!(matches!(token.complete(), Err(AnswerError::ReadComplete { .. })));
}

#[test]
fn sizes_the_command_cannot_carry_reject() {
    let (kernel, mut device) = FakeKernel::new().unwrap();
    let msg_id = kernel.open(1, VOLUME, "blob", tempfile::tempfile().unwrap()).unwrap();
    let error = open(&mut device).accept(1 << 63).unwrap_err();
    assert!(matches!(error, AnswerError::Size { size, .. } if size == 1 << 63));
    assert_eq!(reply(&kernel), Reply::Copen { msg_id, size: -5 });
}

#[test]
fn senseless_messages_are_answered_and_survived() {
    use skimmer_cachefiles::message::{Body, Message, Open};
    let (kernel, mut device) = FakeKernel::new().unwrap();
    let (object, _file) = object(&kernel, &mut device, 1, 4096);

    kernel.send_raw(&[1; 7]).unwrap();
    assert!(matches!(device.next_request(), Err(DeviceError::Message(_))));
    assert!(silent(&kernel));

    // A READ of nothing: completed without data.
    let msg_id = kernel.read(1, 0, 0).unwrap();
    assert!(matches!(device.next_request(), Err(DeviceError::Message(_))));
    assert_eq!(reply(&kernel), Reply::ReadComplete { msg_id, object_id: 1 });

    // An OPEN without a cookie key: rejected, its descriptor closed.
    let (read_end, write_end) = std::io::pipe().unwrap();
    kernel.open(2, VOLUME, "", File::from(OwnedFd::from(write_end))).unwrap();
    let error = device.next_request().unwrap_err();
    assert!(error.to_string().contains("cookie key is empty"), "{error}");
    assert!(matches!(reply(&kernel), Reply::Copen { size: -22, .. }));
    assert_eq!(read_all(read_end), 0);

    // An OPEN whose descriptor is not there.
    let open = Open { volume_key: b"v"[..].into(), cookie_key: b"c"[..].into(), fd: 1 << 20, flags: 0 };
    let message = Message { msg_id: 99, object_id: 9, body: Body::Open(open) };
    kernel.send_raw(&message.encode().unwrap()).unwrap();
    assert!(matches!(device.next_request(), Err(DeviceError::Descriptor { msg_id: 99, .. })));
    assert_eq!(reply(&kernel), Reply::Copen { msg_id: 99, size: -9 });

    // And then as if nothing had happened.
    kernel.read(1, 0, 4096).unwrap();
    object.write_all_at(&[1; 4096], 0).unwrap();
    read(&mut device).complete().unwrap();
    assert!(matches!(reply(&kernel), Reply::ReadComplete { .. }));
}

#[test]
fn bind_speaks_the_commands_in_order() {
    let (kernel, device) = FakeKernel::new().unwrap();
    device.bind(&BindOptions::new("/var/lib/skimmer/fs cache")).unwrap();
    let commands: Vec<Reply> = (0..9).map(|_| reply(&kernel)).collect();
    let expected = [
        "dir /var/lib/skimmer/fs cache",
        "tag skimmer",
        "brun 7%",
        "bcull 5%",
        "bstop 1%",
        "frun 7%",
        "fcull 5%",
        "fstop 1%",
        "bind ondemand",
    ];
    assert_eq!(commands, expected.map(|command| Reply::Command(command.into())));
    assert!(device.restore_or_bind(&BindOptions::new("/x")).unwrap(), "the stand-in takes restore");
    assert_eq!(reply(&kernel), Reply::Command("restore".into()));
    assert!(silent(&kernel));
}

#[test]
fn impossible_bindings_are_refused_before_they_reach_the_kernel() {
    let (kernel, device) = FakeKernel::new().unwrap();
    let mut options = BindOptions::new("/cache\nbind");
    assert!(matches!(device.bind(&options), Err(DeviceError::BadCommand(_))));
    options = BindOptions::new(format!("/{}", "x".repeat(4095)));
    assert!(matches!(device.bind(&options), Err(DeviceError::BadCommand(_))));
    options = BindOptions::new("/cache");
    options.limits.bcull = 7;
    assert!(matches!(device.bind(&options), Err(DeviceError::Limits { name: 'b', .. })));
    assert!(silent(&kernel));
}

#[test]
fn a_real_descriptor_that_is_no_device_fails_with_names() {
    let error = Device::open_path("/no such device".as_ref()).unwrap_err();
    assert!(error.to_string().starts_with("/no such device: "), "{error}");
    // A command the kernel side refuses names the command.
    let read_only = File::open("/dev/null").unwrap();
    let device = Device::from_fd(read_only.into());
    let error = device.restore().unwrap_err();
    assert!(error.to_string().starts_with("cachefiles command \"restore\": "), "{error}");
}
