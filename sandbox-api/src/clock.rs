// SPDX-License-Identifier: Apache-2.0
//! Times as they are stored (ms since 1970) and shown (RFC 3339, "3 minutes ago").

use chrono::{DateTime, SecondsFormat, Utc};

/// Milliseconds since 1970, UTC.
pub type Millis = i64;

/// Now.
pub fn now() -> Millis {
    Utc::now().timestamp_millis()
}

/// Now in ns since 1970.
pub fn unix_ns() -> u64 {
    Utc::now()
        .timestamp_nanos_opt()
        .and_then(|nanos| u64::try_from(nanos).ok())
        .unwrap_or(0)
}

/// RFC 3339 with nanoseconds, as docker's logs have it.
pub fn rfc3339_now() -> String {
    Utc::now().to_rfc3339_opts(SecondsFormat::Nanos, true)
}

/// RFC 3339.
pub fn rfc3339(time: Millis) -> String {
    DateTime::from_timestamp_millis(time)
        .unwrap_or_default()
        .to_rfc3339_opts(SecondsFormat::Millis, true)
}

/// Reads RFC 3339, or a duration back from `now` such as `90s`, `10m`, `2h`, `1d`.
pub fn parse_since(text: &str, now: Millis) -> Option<Millis> {
    if let Ok(time) = DateTime::parse_from_rfc3339(text) {
        return Some(time.timestamp_millis());
    }
    let unit = match text.chars().last()? {
        's' => 1000,
        'm' => 60_000,
        'h' => 3_600_000,
        'd' => 86_400_000,
        _ => return text.parse::<i64>().ok()?.checked_mul(1000),
    };
    let count: i64 = text.get(..text.len().checked_sub(1)?)?.parse().ok()?;
    now.checked_sub(count.checked_mul(unit)?)
}

/// A length of time in docker's words.
pub fn human(millis: Millis) -> String {
    let seconds = millis.max(0) / 1000;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match () {
        () if seconds < 1 => "Less than a second".into(),
        () if seconds == 1 => "1 second".into(),
        () if seconds < 60 => format!("{seconds} seconds"),
        () if minutes == 1 => "About a minute".into(),
        () if minutes < 60 => format!("{minutes} minutes"),
        () if hours == 1 => "About an hour".into(),
        () if hours < 48 => format!("{hours} hours"),
        () if days < 14 => format!("{days} days"),
        () if days < 60 => format!("{} weeks", days / 7),
        () if days < 730 => format!("{} months", days / 30),
        () => format!("{} years", days / 365),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shown_as_docker_shows_it() {
        for (seconds, text) in [
            (0, "Less than a second"),
            (1, "1 second"),
            (59, "59 seconds"),
            (60, "About a minute"),
            (150, "2 minutes"),
            (3600, "About an hour"),
            (7200, "2 hours"),
            (200_000, "2 days"),
            (20 * 86_400, "2 weeks"),
            (100 * 86_400, "3 months"),
            (800 * 86_400, "2 years"),
        ] {
            assert_eq!(human(seconds * 1000), text);
        }
        assert_eq!(human(-5), "Less than a second");
    }

    #[test]
    fn since() {
        assert_eq!(parse_since("2024-01-02T03:04:05Z", 0), Some(1_704_164_645_000));
        assert_eq!(parse_since("10m", 1_000_000), Some(400_000));
        assert_eq!(parse_since("12", 0), Some(12_000));
        for wrong in ["", "m", "x", "10y", "999999999999999999999s"] {
            assert_eq!(parse_since(wrong, 0), None, "{wrong}");
        }
    }

    #[test]
    fn stored_and_shown() {
        assert_eq!(rfc3339(1_704_164_645_000), "2024-01-02T03:04:05.000Z");
    }
}
