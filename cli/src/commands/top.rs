//! `skimmer top`: the daemon as it works, until `q`.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use skimmer_client::Client;

use crate::top::{Sample, Screen, draw};
use crate::{Global, daemon, output};

/// Size of the picture where there is no terminal.
const PAPER: (u16, u16) = (120, 32);

/// Arguments of the command.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Seconds between two looks.
    #[arg(long, short, default_value = "1", value_parser = interval)]
    interval: Duration,
    /// Print what happened in one interval and end; also what is done when the output is no terminal.
    #[arg(long)]
    once: bool,
    #[command(flatten)]
    daemon: daemon::Daemon,
}

fn interval(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    if (0.1..=3600.0).contains(&seconds) {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err("must be from 0.1 to 3600".to_owned())
    }
}

pub(crate) async fn run(options: Options, global: &Global) -> Result<()> {
    let client = options.daemon.connect().await?;
    if global.json || options.once || !std::io::stdout().is_terminal() {
        return once(&client, options.interval, global).await;
    }
    let mut terminal = ratatui::try_init().context("cannot use the terminal")?;
    let result = live(&client, options.interval, &mut terminal).await;
    ratatui::restore();
    result
}

async fn look(client: &Client) -> Result<Sample> {
    let status = client.status().await?;
    Ok(Sample::new(status, &client.metrics().await?))
}

async fn once(client: &Client, interval: Duration, global: &Global) -> Result<()> {
    let before = look(client).await?;
    tokio::time::sleep(interval).await;
    let now = look(client).await?;
    let rates = now.since(&before);
    if global.json {
        return output::json(&rates);
    }
    let mut screen = Screen::default();
    screen.add(&rates);
    let mut paper = Terminal::new(TestBackend::new(PAPER.0, PAPER.1))?;
    paper.draw(|frame| draw(frame, &screen, &now, &rates))?;
    let buffer = paper.backend().buffer();
    let lines = buffer.content().chunks(usize::from(PAPER.0));
    for line in lines {
        let line: String = line.iter().map(ratatui::buffer::Cell::symbol).collect();
        output::line(line.trim_end())?;
    }
    Ok(())
}

async fn live(client: &Client, interval: Duration, terminal: &mut ratatui::DefaultTerminal) -> Result<()> {
    let mut screen = Screen::default();
    let mut before = look(client).await?;
    let mut wait = Duration::from_millis(200).min(interval);
    loop {
        if quits(wait)? {
            return Ok(());
        }
        wait = interval;
        let now = match look(client).await {
            Ok(now) => now,
            // It may be restarted under us: one more try.
            Err(_) => {
                tokio::time::sleep(interval).await;
                look(client).await?
            }
        };
        let rates = now.since(&before);
        screen.add(&rates);
        terminal.draw(|frame| draw(frame, &screen, &now, &rates))?;
        before = now;
    }
}

/// Waits for a key that ends it.
fn quits(wait: Duration) -> Result<bool> {
    let until = Instant::now() + wait;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if !event::poll(left).context("cannot read from the terminal")? {
            return Ok(false);
        }
        match event::read().context("cannot read from the terminal")? {
            Event::Key(key) => {
                let interrupted =
                    key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
                if interrupted || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) {
                    return Ok(true);
                }
            }
            // Drawn anew at once.
            Event::Resize(..) => return Ok(false),
            _ => {}
        }
    }
}
