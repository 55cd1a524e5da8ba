// SPDX-License-Identifier: Apache-2.0
//! Tables as docker prints them: columns three blanks apart.

/// Lays out rows under a header.
pub fn render(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|title| title.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let titles: Vec<String> = header.iter().map(|title| (*title).to_owned()).collect();
    for row in std::iter::once(&titles).chain(rows) {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(row) {
            line.push_str(cell);
            line.extend(std::iter::repeat_n(
                ' ',
                width.saturating_sub(cell.chars().count()).saturating_add(3),
            ));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Cuts a text to `width` characters, the last one an ellipsis.
pub fn truncate(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let mut cut: String = text.chars().take(width.saturating_sub(1)).collect();
    cut.push('\u{2026}');
    cut
}

/// Escapes what would do something to a terminal: names in images are not to be trusted.
pub fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            if c.is_control() {
                c.escape_default().collect::<Vec<_>>()
            } else {
                vec![c]
            }
        })
        .collect()
}

/// A size in docker's decimal units.
pub fn decimal_size(bytes: u64) -> String {
    scaled(bytes, 1000, &["B", "kB", "MB", "GB", "TB", "PB"])
}

/// A size in binary units.
pub fn binary_size(bytes: u64) -> String {
    scaled(bytes, 1024, &["B", "KiB", "MiB", "GiB", "TiB", "PiB"])
}

fn scaled(bytes: u64, base: u64, units: &[&str]) -> String {
    let mut unit = 0;
    let mut divisor = 1_u64;
    while bytes / divisor >= base && unit + 1 < units.len() {
        divisor = divisor.saturating_mul(base);
        unit += 1;
    }
    let name = units.get(unit).copied().unwrap_or_default();
    let (whole, rest) = (bytes / divisor, bytes % divisor);
    if unit == 0 || whole >= 100 {
        return format!("{whole}{name}");
    }
    let decimals = if whole >= 10 { 1 } else { 2 };
    let scale = 10_u64.pow(decimals);
    let fraction = u128::from(rest) * u128::from(scale) / u128::from(divisor);
    format!(
        "{whole}.{fraction:0width$}{name}",
        width = usize::try_from(decimals).unwrap_or(1)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns() {
        let rows = vec![
            vec!["abc".to_owned(), "d".to_owned()],
            vec!["a".to_owned(), String::new()],
        ];
        assert_eq!(render(&["ID", "NAME"], &rows), "ID    NAME\nabc   d\na\n");
        assert_eq!(render(&["ID"], &[]), "ID\n");
    }

    #[test]
    fn sizes() {
        for (bytes, text) in [
            (0, "0B"),
            (999, "999B"),
            (1000, "1.00kB"),
            (4_260_000, "4.26MB"),
            (77_800_000, "77.8MB"),
            (187_000_000, "187MB"),
            (u64::MAX, "18446PB"),
        ] {
            assert_eq!(decimal_size(bytes), text);
        }
        assert_eq!(binary_size(512 << 20), "512MiB");
    }

    #[test]
    fn texts() {
        assert_eq!(truncate("abcdef", 4), "abc\u{2026}");
        assert_eq!(truncate("abc", 4), "abc");
        assert_eq!(printable("a\x1b[2J"), "a\\u{1b}[2J");
    }
}
