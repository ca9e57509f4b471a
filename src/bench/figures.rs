//! Figures as they are printed and kept, beside what the hardware allows and what others reach.

use anyhow::Context;
use serde_json::{Value, json};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use time::OffsetDateTime;

/// Bytes per second that reading device memory reaches: measured on one H200.
pub const READ_BYTES_PER_SEC: f64 = 4.22e12;

/// What is known of a figure: its best possible value and the best of others.
struct Known {
    id: &'static str,
    /// The most, or where less is better the least, that the hardware allows.
    ceiling: Option<f64>,
    peer: Option<f64>,
    less_is_better: bool,
}

const fn more(id: &'static str, ceiling: Option<f64>, peer: Option<f64>) -> Known {
    Known { id, ceiling, peer, less_is_better: false }
}

const fn less(id: &'static str, ceiling: Option<f64>, peer: Option<f64>) -> Known {
    Known { id, ceiling, peer, less_is_better: true }
}

/// For the Llama-3-8B shape on one H200; ceilings and peers were measured there. Training: forward
/// and dX through a frozen base at 690 TFLOP/s, in F1 with causal attention over 2048. Decode:
/// bytes read per step. Peers: transformers with PEFT and torch.compile (F1), vLLM 0.24 (D).
const KNOWN: [Known; 10] = [
    more("F1", Some(20_500.0), Some(14_100.0)),
    more("F2", Some(23_000.0), None),
    more("F3", Some(100.0), None),
    less("F4", None, None),
    more("D1-base", Some(281.0), Some(205.0)),
    more("D1-adapter", Some(279.0), Some(149.0)),
    more("D2", Some(13_900.0), Some(3_224.0)),
    less("D3-1", None, Some(23.0)),
    less("D3-32", Some(14.0), Some(70.0)),
    more("D4", Some(46_000.0), Some(31_909.0)),
];

/// Prints figures as they come, one line each, and appends those with an id to a file.
pub struct Report {
    /// Whether ceilings and peers hold for what is measured.
    known: bool,
    origin: Origin,
    json: Option<File>,
    /// Ids and values so far.
    pub values: Vec<(&'static str, f64)>,
}

/// Where figures come from.
pub struct Origin {
    /// As typed.
    pub command: String,
    /// Of the source.
    pub commit: String,
}

impl Report {
    /// Says what is measured.
    pub fn new(
        device: &str,
        base: &str,
        origin: Origin,
        json: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let open = |path: &Path| {
            let file = OpenOptions::new().create(true).append(true).open(path);
            file.with_context(|| format!("--json {}", path.display()))
        };
        println!("{base} on {device}");
        Ok(Self {
            known: device.contains("H200") && base == "llama3-8b",
            origin,
            json: json.map(open).transpose()?,
            values: Vec::new(),
        })
    }

    /// Writes the head of the table.
    pub fn head(&self) {
        println!(
            "{:<11} {:>10} {:<11} {:>9} {:>6} {:>9} {:>6}  details",
            "figure", "value", "unit", "ceiling", "of it", "peer", "ratio"
        );
    }

    /// A figure with a ceiling of its own, which no goal names.
    pub fn line(&self, name: &str, value: f64, unit: &str, ceiling: Option<f64>, details: &str) {
        print_line(name, value, unit, &more("", ceiling, None), details);
    }

    /// A figure that the goals name, or one beside them under `name`.
    pub fn show(
        &mut self,
        id: Option<&'static str>,
        name: &str,
        value: f64,
        unit: &'static str,
        details: &str,
    ) -> anyhow::Result<()> {
        match id {
            Some(id) => self.figure(id, value, unit, details),
            None => {
                self.line(name, value, unit, None, details);
                Ok(())
            }
        }
    }

    /// A figure that the goals name.
    pub fn figure(
        &mut self,
        id: &'static str,
        value: f64,
        unit: &'static str,
        details: &str,
    ) -> anyhow::Result<()> {
        let nothing = less(id, None, None);
        let known = KNOWN.iter().find(|known| self.known && known.id == id).unwrap_or(&nothing);
        print_line(id, value, unit, known, details);
        self.values.push((id, value));
        let Some(file) = &mut self.json else { return Ok(()) };
        let line = json!({
            "id": id,
            "value": rounded(value),
            "unit": unit,
            "ceiling": known.ceiling,
            "peer": known.peer,
            "command": self.origin.command,
            "commit": self.origin.commit,
            "date": today(),
        });
        writeln!(file, "{line}").context("the figures cannot be written")
    }
}

fn print_line(name: &str, value: f64, unit: &str, known: &Known, details: &str) {
    let share = |other: f64| match known.less_is_better {
        true => other / value,
        false => value / other,
    };
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), short);
    let of_it = known.ceiling.map_or_else(String::new, |c| format!("{:.1}%", 100.0 * share(c)));
    let ratio = known.peer.map_or_else(String::new, |p| format!("{:.2}x", share(p)));
    let (value, ceiling, peer) = (short(value), number(known.ceiling), number(known.peer));
    let line = format!(
        "{name:<11} {value:>10} {unit:<11} {ceiling:>9} {of_it:>6} {peer:>9} {ratio:>6}  {details}"
    );
    println!("{}", line.trim_end());
}

/// Four digits at least, no more decimals than that takes.
fn short(value: f64) -> String {
    let decimals = match value.abs() {
        size if size >= 1000.0 => 0,
        size if size >= 100.0 => 1,
        size if size >= 10.0 => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

/// To be kept: the digits that [`short`] prints.
fn rounded(value: f64) -> Value {
    short(value).parse::<f64>().map_or(Value::Null, |value| json!(value))
}

fn today() -> String {
    let now = OffsetDateTime::now_utc();
    format!("{:04}-{:02}-{:02}", now.year(), u8::from(now.month()), now.day())
}

impl Origin {
    /// This process; `commit` is asked of git where it is not given.
    pub fn of_this_run(commit: Option<String>) -> Self {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let asked = || {
            let git = Command::new("git").args(["rev-parse", "--short", "HEAD"]).output();
            let output = git.ok().filter(|output| output.status.success())?;
            Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        };
        Self {
            command: format!("loquetier {}", arguments.join(" ")),
            commit: commit.or_else(asked).unwrap_or_else(|| "unknown".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_kept_as_printed() {
        for (value, text) in [
            (12_345.6, "12346"),
            (149.96, "150.0"),
            (19.0, "19.00"),
            (3.3, "3.300"),
            (-2.0, "-2.000"),
        ] {
            assert_eq!(short(value), text);
        }
        assert_eq!(rounded(12_345.6), json!(12_346.0));
        assert_eq!(rounded(f64::NAN), Value::Null);
    }

    #[test]
    fn kept_lines_have_the_agreed_fields_in_order() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("figures.json");
        let origin = || Origin { command: "loquetier bench all".into(), commit: "abc".into() };
        for _ in 0..2 {
            let report = Report::new("cuda:0 NVIDIA H200", "llama3-8b", origin(), Some(&path));
            let mut report = report.expect("a report");
            report.figure("D2", 5000.04, "tokens/s", "").expect("a line");
        }
        let text = std::fs::read_to_string(&path).expect("lines");
        let line = text.lines().next().expect("a line");
        assert_eq!(text.lines().count(), 2, "figures are appended");
        let start =
            r#"{"id":"D2","value":5000.0,"unit":"tokens/s","ceiling":13900.0,"peer":3224.0,"#;
        assert!(line.starts_with(start), "{line}");
        let rest = r#""command":"loquetier bench all","commit":"abc","date":"20"#;
        assert!(line[start.len()..].starts_with(rest), "{line}");
    }
}
