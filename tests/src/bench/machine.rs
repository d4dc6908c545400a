//! What the figures were taken on.

use std::fs;

use serde_json::{Value, json};

/// The machine, as the kernel describes it.
#[derive(Clone, Debug)]
pub struct Machine {
    kernel: String,
    processor: String,
    processors: usize,
    memory_mib: u64,
    system: String,
    huge_pages: String,
}

impl Machine {
    /// This one.
    #[must_use]
    pub fn this() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, key: &str, separator: char| {
            let line = text.lines().find(|l| l.starts_with(key));
            let value = line.and_then(|l| l.split_once(separator));
            value.map_or_else(
                || "?".to_owned(),
                |(_, v)| v.trim().trim_matches('"').to_owned(),
            )
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal", ':');
        let kib: u64 = memory.trim_end_matches(" kB").parse().unwrap_or(0);
        let cpuinfo = read("/proc/cpuinfo");
        let guest = if cpuinfo.contains(" hypervisor") {
            ", a guest"
        } else {
            ""
        };
        let huge = read("/sys/kernel/mm/transparent_hugepage/enabled");
        let chosen = huge.split(['[', ']']).nth(1).unwrap_or("none");
        Self {
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            processor: format!("{}{guest}", field(&cpuinfo, "model name", ':')),
            processors: cpuinfo
                .lines()
                .filter(|l| l.starts_with("processor"))
                .count(),
            memory_mib: kib / 1024,
            system: field(&read("/etc/os-release"), "PRETTY_NAME", '='),
            huge_pages: chosen.to_owned(),
        }
    }

    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        format!(
            "{}, Linux {}; {} x {}; {} MiB; transparent huge pages: {}",
            self.system,
            self.kernel,
            self.processors,
            self.processor,
            self.memory_mib,
            self.huge_pages
        )
    }

    /// For programs.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "system": self.system,
            "kernel": self.kernel,
            "processor": self.processor,
            "processors": self.processors,
            "memory_mib": self.memory_mib,
            "transparent_huge_pages": self.huge_pages,
        })
    }
}

/// How many processors the machine has.
#[must_use]
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The load of the last minute.
#[must_use]
pub fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let first = text.split(' ').next().and_then(|w| w.parse().ok());
    first.unwrap_or(0.0)
}
