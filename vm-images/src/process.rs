//! Running a helper program to its end.

use std::io::ErrorKind;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Runs `command` with no input and returns its standard output.
///
/// # Errors
/// The program cannot be started or ends with a failure: the message holds its command line and the end of what it
/// wrote to standard error.
pub fn run(command: &mut Command) -> Result<Vec<u8>> {
    let shown = format!("{command:?}");
    let output = match command.stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            bail!("{:?} is not installed (wanted for {shown})", command.get_program());
        }
        Err(error) => return Err(error).with_context(|| format!("cannot start {shown}")),
    };
    if !output.status.success() {
        bail!("{shown} failed with {}:\n{}", output.status, tail(&output.stderr));
    }
    Ok(output.stdout)
}

/// The last lines of a program's messages: enough to see the cause.
fn tail(bytes: &[u8]) -> String {
    const LINES: usize = 30;
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_shows_the_command_and_its_message() {
        let error = run(Command::new("sh").args(["-c", "echo out; echo broken >&2; exit 3"])).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("exit 3") && text.contains("broken"), "{text}");
        assert_eq!(run(Command::new("echo").arg("hello")).unwrap(), b"hello\n");
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = run(&mut Command::new("skimmer-no-such-program")).unwrap_err();
        assert!(error.to_string().contains("skimmer-no-such-program\" is not installed"), "{error}");
    }
}
