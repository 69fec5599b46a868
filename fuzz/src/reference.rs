//! An image name as a user or a config file gives it.

use skimmer_fetcher::Reference;
use skimmer_fetcher::reference::RegistryRef;

/// Parses `data` as the name of an image to read and to write; a name that is understood can be said again.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(name) = RegistryRef::parse(text) {
        let shown = name.to_string();
        assert_eq!(RegistryRef::parse(&shown).as_ref(), Ok(&name), "{shown}");
        // These go into URLs as they are.
        let plain = |c: char| c.is_ascii_graphic() && !"?#%\\\"<>@ ".contains(c);
        assert!(name.host().chars().all(plain) && !name.host().contains('/'), "host {:?}", name.host());
        assert!(name.repository().chars().all(plain), "repository {:?}", name.repository());
        assert!(name.repository().split('/').all(|part| !part.is_empty() && part != "." && part != ".."));
        assert!(name.tag().is_none_or(|tag| !tag.is_empty() && tag.chars().all(plain) && !tag.contains('/')));
        assert!(name.tag().is_some() || name.digest().is_some());
    }
    for parsed in [Reference::parse_source(text), Reference::parse_destination(text)] {
        match parsed {
            Ok(reference) => {
                if let Reference::Registry(name) = &reference {
                    let named = format!("docker://{name}");
                    assert_eq!(Reference::parse_source(&named).as_ref(), Ok(&reference), "{named}");
                }
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
}
