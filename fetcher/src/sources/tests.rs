use bytes::Bytes;
use futures_util::{StreamExt as _, stream};

use super::*;

/// What a fake host does with a request.
#[derive(Clone, Copy)]
enum Act {
    Right,
    Fail(ErrorClass),
    /// Fails after so many bytes.
    Break(u64),
    /// Gives so many bytes and then none.
    Stall(u64),
    Slow(Duration),
    Wrong,
}

struct Fake {
    name: &'static str,
    act: Act,
    asked: Mutex<Vec<String>>,
}

fn byte(at: u64) -> u8 {
    u8::try_from(at % 251).unwrap()
}

#[async_trait::async_trait]
impl Source for Fake {
    fn name(&self) -> &str {
        self.name
    }

    async fn read(&self, blob: &BlobRef, range: Range<u64>, _: Urgency) -> Result<Body, SourceError> {
        self.asked.lock().unwrap().push(format!("{range:?}"));
        let error = |class| SourceError::new(class, self.name, "made to fail");
        let wrong = matches!(self.act, Act::Wrong);
        let piece = move |at: u64| Ok(Bytes::from(vec![if wrong { 255 } else { byte(at) }]));
        let all = stream::iter(range.clone()).map(piece);
        let pieces = match self.act {
            Act::Fail(class) => return Err(error(class)),
            Act::Right | Act::Wrong => all.boxed(),
            Act::Break(after) => {
                let broken = Err(error(ErrorClass::Transient));
                all.take(usize::try_from(after).unwrap()).chain(stream::iter([broken])).boxed()
            }
            Act::Stall(after) => all.take(usize::try_from(after).unwrap()).chain(stream::pending()).boxed(),
            Act::Slow(time) => {
                tokio::time::sleep(time).await;
                all.boxed()
            }
        };
        Ok(Body::new(self.name, blob, range, None, pieces))
    }

    async fn has(&self, _: &BlobRef) -> Result<bool, SourceError> {
        match self.act {
            Act::Fail(ErrorClass::NotFound) => Ok(false),
            Act::Fail(class) => Err(SourceError::new(class, self.name, "made to fail")),
            _ => Ok(true),
        }
    }
}

struct World {
    fakes: Vec<Arc<Fake>>,
    sources: Sources,
    blob: BlobRef,
}

fn world(acts: &[Act]) -> World {
    const NAMES: [&str; 3] = ["one", "two", "three"];
    let fakes: Vec<_> = NAMES
        .into_iter()
        .zip(acts)
        .map(|(name, act)| Arc::new(Fake { name, act: *act, asked: Mutex::default() }))
        .collect();
    let members = fakes.iter().map(|fake| (Arc::clone(fake) as Arc<dyn Source>, Arc::new(Health::default())));
    let sources = Sources::new("all", members);
    World { fakes, sources, blob: BlobRef { digest: Digest::of(b"x"), size: 1000 } }
}

impl World {
    async fn read(&self, range: Range<u64>) -> Result<Vec<u8>, SourceError> {
        self.sources.read(&self.blob, range, Urgency::Demand).await?.collect().await
    }

    fn asked(&self) -> Vec<Vec<String>> {
        self.fakes.iter().map(|fake| std::mem::take(&mut *fake.asked.lock().unwrap())).collect()
    }
}

fn right(range: Range<u64>) -> Vec<u8> {
    range.map(byte).collect()
}

#[tokio::test(start_paused = true)]
async fn the_first_that_is_well_is_asked() {
    let all = world(&[Act::Right, Act::Right]);
    assert_eq!(all.sources.width(), 2);
    assert_eq!(all.read(5..20).await.unwrap(), right(5..20));
    assert_eq!(all.asked(), [vec!["5..20"], vec![]]);

    let broken = world(&[Act::Fail(ErrorClass::Transient), Act::Fail(ErrorClass::Denied), Act::Right]);
    for turn in 0..10 {
        assert_eq!(broken.read(5..20).await.unwrap(), right(5..20));
        // After some failures in a row the first is not asked any more.
        assert_eq!(broken.asked()[0].is_empty(), turn >= 5, "{turn}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_next_goes_on_where_one_broke_off() {
    let world = world(&[Act::Break(7), Act::Break(3), Act::Right]);
    assert_eq!(world.read(0..50).await.unwrap(), right(0..50));
    assert_eq!(world.asked(), [vec!["0..50"], vec!["7..50"], vec!["10..50"]]);
}

#[tokio::test(start_paused = true)]
async fn one_that_is_slow_is_raced() {
    let long = Duration::from_secs(600);
    let began = Instant::now();
    let slow = world(&[Act::Slow(long), Act::Right]);
    assert_eq!(slow.read(0..50).await.unwrap(), right(0..50));
    assert_eq!(slow.asked(), [vec!["0..50"], vec!["0..50"]]);
    let stalled = world(&[Act::Stall(9), Act::Right]);
    assert_eq!(stalled.read(0..50).await.unwrap(), right(0..50));
    assert_eq!(stalled.asked(), [vec!["0..50"], vec!["9..50"]]);
    assert!(began.elapsed() < Duration::from_secs(3));
    // The one that was asked first may still win.
    let other = world(&[Act::Slow(Duration::from_millis(600)), Act::Slow(long)]);
    assert_eq!(other.read(0..50).await.unwrap(), right(0..50));
    // The other's failure does not end its turn, and there is nobody else to race.
    let other = world(&[Act::Slow(Duration::from_secs(5)), Act::Fail(ErrorClass::Transient)]);
    assert_eq!(other.read(0..50).await.unwrap(), right(0..50));
}

#[tokio::test(start_paused = true)]
async fn races_are_few() {
    let slow = world(&[Act::Slow(Duration::from_secs(1)), Act::Right]);
    let mut raced = 0;
    for _ in 0..7 {
        slow.read(0..5).await.unwrap();
        raced += slow.asked()[1].len();
    }
    // What was earned before, and no more; then the times seen make it wait longer.
    assert!((1..=3).contains(&raced), "{raced}");
}

#[tokio::test(start_paused = true)]
async fn wrong_bytes_are_held_against_who_sent_them() {
    let world = world(&[Act::Break(10), Act::Wrong, Act::Right]);
    let body = world.sources.read(&world.blob, 0..50, Urgency::Demand).await.unwrap();
    let blame = body.blame().unwrap();
    assert_eq!(body.collect().await.unwrap()[10..], [255; 40]);
    assert_eq!(blame(0..10), "one");
    assert_eq!(blame(20..50), "two");
    world.asked();
    // Both are asked last for this blob now.
    assert_eq!(world.read(0..50).await.unwrap(), right(0..50));
    assert_eq!(world.asked(), [vec![], vec![], vec!["0..50"]]);
    tokio::time::advance(SHUNNED).await;
    world.read(0..5).await.unwrap();
    assert_eq!(world.asked()[0], ["0..5"]);
    // Another lie soon after, and it is asked last for every blob.
    blame(20..50);
    let other = BlobRef { digest: Digest::of(b"y"), ..world.blob };
    let names = |members: Vec<Arc<Member>>| members.iter().map(|m| m.name().to_owned()).collect::<Vec<_>>();
    let (good, bad) = world.sources.order(&other.digest);
    assert_eq!((names(good), names(bad)), (vec!["one".to_owned(), "three".into()], vec!["two".to_owned()]));
}

#[tokio::test(start_paused = true)]
async fn when_all_fail_each_is_named() {
    let absent = world(&[Act::Fail(ErrorClass::NotFound), Act::Fail(ErrorClass::NotFound)]);
    let error = absent.read(3..4).await.unwrap_err();
    assert_eq!(error.class, ErrorClass::NotFound);
    let text = error.to_string();
    assert!(text.contains("one: made to fail; two: made to fail") && text.contains("bytes 3..4"), "{text}");
    assert!(!absent.sources.has(&absent.blob).await.unwrap());
    let mixed = world(&[Act::Fail(ErrorClass::NotFound), Act::Fail(ErrorClass::Transient)]);
    assert_eq!(mixed.read(3..4).await.unwrap_err().class, ErrorClass::Transient);
    assert!(mixed.sources.has(&mixed.blob).await.is_err());
    let late = world(&[Act::Break(3), Act::Break(4)]);
    assert_eq!(late.read(0..50).await.unwrap_err().class, ErrorClass::Transient);
}
