//! Every file of the corpus through its target's body, so that no compiler but the stable one is needed to keep what
//! fuzzing has found.

use std::path::Path;

use skimmer_fuzz::TARGETS;

#[test]
fn every_corpus_file_passes() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (name, run) in TARGETS {
        let folder = corpus.join(name);
        let entries =
            std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        files.sort();
        assert!(!files.is_empty(), "target {name} has no corpus");
        run(b"");
        for file in files {
            // The name of a file that fails is in the output of a failed test.
            println!("{}", file.display());
            run(&std::fs::read(&file).unwrap());
        }
    }
}

#[test]
fn every_corpus_folder_has_a_target() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for entry in std::fs::read_dir(corpus).unwrap() {
        let name = entry.unwrap().file_name();
        assert!(TARGETS.iter().any(|(target, _)| name == *target), "{name:?} belongs to no target");
    }
}

#[test]
fn rows_keep_an_image() {
    let mut image = vec![0; 4096];
    (image[16], image[4095]) = (1, 2);
    assert_eq!(skimmer_fuzz::image_rows::expand(&skimmer_fuzz::image_rows::compact(&image)), image);
}
