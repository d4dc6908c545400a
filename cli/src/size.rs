//! Sizes as people write them: `512M`, `2G`, `25%`.

use std::str::FromStr;

/// A size as given: bytes, or a share of the machine's memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Size {
    /// So many bytes.
    Bytes(u64),
    /// So many hundredths of the machine's RAM.
    Percent(f64),
}

/// The least budget that makes sense, bytes.
pub const LEAST_BYTES: u64 = 1 << 20;

/// Why a size cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Not one of the forms.
    #[error(
        "\"{0}\" is not a size: write bytes (4194304), or a number with K, M, G or T (512M, 1.5G), or a \
         share of this machine's memory (25%)"
    )]
    Form(String),
    /// Too small or too large.
    #[error(
        "\"{0}\" is too small or too large for a budget: write at least 1M and at most 1024T, in bytes (4194304) or as a \
         number with K, M, G or T (512M, 1.5G), or a share of this machine's memory up to 100% (25%)"
    )]
    Range(String),
}

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let form = || SizeError::Form(text.to_owned());
        let range = || SizeError::Range(text.to_owned());
        let t = text.trim();
        let digits = t
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(t.len());
        let (number, unit) = t.split_at(digits);
        let value: f64 = number.parse().map_err(|_| form())?;
        let unit = unit.trim();
        if unit == "%" {
            return if value > 0.0 && value <= 100.0 {
                Ok(Self::Percent(value))
            } else {
                Err(range())
            };
        }
        let shift = match unit.to_ascii_uppercase().as_str() {
            "" | "B" => 0,
            "K" | "KB" | "KIB" => 10,
            "M" | "MB" | "MIB" => 20,
            "G" | "GB" | "GIB" => 30,
            "T" | "TB" | "TIB" => 40,
            _ => return Err(form()),
        };
        let bytes = value
            * f64::from(1_u32 << (shift % 32))
            * if shift >= 32 { 4_294_967_296.0 } else { 1.0 };
        if bytes < LEAST_BYTES as f64 || bytes > (1_u64 << 50) as f64 {
            return Err(range());
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "checked to lie between 1 MiB and 1 PiB"
        )]
        let bytes = bytes as u64;
        Ok(Self::Bytes(bytes))
    }
}

impl Size {
    /// In bytes, on a machine with `ram_bytes`.
    #[must_use]
    pub fn bytes(self, ram_bytes: u64) -> u64 {
        match self {
            Self::Bytes(b) => b,
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a share of a u64, between 0 and 100 %"
            )]
            Self::Percent(p) => ((ram_bytes as f64 * p / 100.0) as u64).max(LEAST_BYTES),
        }
    }
}

/// This machine's RAM, bytes.
///
/// # Errors
/// `/proc/meminfo` cannot be read.
pub fn ram_bytes() -> std::io::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    text.lines()
        .find_map(|l| l.strip_prefix("MemTotal:"))
        .and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok())
        .map(|kib| kib * 1024)
        .ok_or_else(|| std::io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_understood() {
        for (text, want) in [
            ("4194304", 4 << 20),
            ("512M", 512 << 20),
            ("512m", 512 << 20),
            ("2G", 2 << 30),
            ("1.5G", 3 << 29),
            ("64 MiB", 64 << 20),
            ("1T", 1 << 40),
            ("2048K", 2 << 20),
        ] {
            assert_eq!(text.parse(), Ok(Size::Bytes(want)), "{text}");
        }
        assert_eq!("25%".parse(), Ok(Size::Percent(25.0)));
        assert_eq!(Size::Percent(25.0).bytes(8 << 30), 2 << 30);
    }

    #[test]
    fn a_bad_size_is_told_the_forms() {
        for text in ["", "M", "12X", "1..2G", "-5M", "5 %%", "ten", "0x10"] {
            let e = text.parse::<Size>().expect_err(text);
            assert!(e.to_string().contains("512M"), "{text}: {e}");
        }
        for text in ["0", "100", "0%", "101%", "9999999T"] {
            assert!(
                matches!(text.parse::<Size>(), Err(SizeError::Range(_))),
                "{text}"
            );
        }
    }
}
