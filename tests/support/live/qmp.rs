//! The tests' own client of QEMU's monitor: a line of JSON each way, and events between.

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

pub struct Qmp {
    stream: BufReader<UnixStream>,
    /// What has arrived of a line that is not whole.
    part: String,
    events: Vec<String>,
}

impl Qmp {
    pub fn new(stream: UnixStream) -> Self {
        let mut qmp = Self { stream: BufReader::new(stream), part: String::new(), events: Vec::new() };
        assert!(qmp.line(Duration::from_secs(60)).expect("greeting")["QMP"].is_object());
        qmp.ask("qmp_capabilities", json!({})).expect("qmp_capabilities");
        qmp
    }

    /// The next line; `None` if none comes within `patience`.
    fn line(&mut self, patience: Duration) -> Option<Value> {
        self.stream.get_ref().set_read_timeout(Some(patience)).expect("timeout");
        match self.stream.read_line(&mut self.part) {
            Ok(n) if n > 0 && self.part.ends_with('\n') => {
                let line = std::mem::take(&mut self.part);
                Some(serde_json::from_str(&line).unwrap_or_else(|_| panic!("QMP: {line}")))
            }
            _ => None,
        }
    }

    fn note(&mut self, event: &Value) {
        self.events.push(event["event"].as_str().unwrap_or("?").to_owned());
    }

    pub fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.stream.get_ref().write_all(format!("{request}\n").as_bytes()).map_err(|e| e.to_string())?;
        loop {
            let mut answer = self.line(Duration::from_secs(120)).ok_or("no answer")?;
            if answer.get("event").is_some() {
                self.note(&answer);
            } else if let Some(error) = answer.get("error") {
                return Err(error["desc"].as_str().unwrap_or_default().to_owned());
            } else {
                return Ok(answer["return"].take());
            }
        }
    }

    /// What has happened since this was last asked.
    pub fn events(&mut self) -> Vec<String> {
        while let Some(event) = self.line(Duration::from_millis(100)) {
            self.note(&event);
        }
        std::mem::take(&mut self.events)
    }
}
