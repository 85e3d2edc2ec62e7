//! Go's text form of durations (J-5): `1m30s`, `500ms`, `1.5h`.

use serde::de::Error as _;

use super::Mismatch;

pub(super) const MILLISECOND: i64 = 1_000_000;
pub(super) const SECOND: i64 = 1_000 * MILLISECOND;

/// Longest first where one is the beginning of another.
const UNITS: [(&str, i64); 8] = [
    ("ns", 1),
    ("us", 1_000),
    ("\u{b5}s", 1_000),
    ("\u{3bc}s", 1_000),
    ("ms", MILLISECOND),
    ("s", SECOND),
    ("m", 60 * SECOND),
    ("h", 3_600 * SECOND),
];

/// Returns a duration as a decimal number of units, without needless zeros.
pub(super) fn in_units(text: &str, unit: i64) -> Result<String, Mismatch> {
    let nanoseconds = parse(text)?;
    let sign = if nanoseconds < 0 { "-" } else { "" };
    let (nanoseconds, unit) = (nanoseconds.unsigned_abs(), unit.unsigned_abs());
    let n_digits = unit.ilog10() as usize;
    let number = format!("{sign}{}.{:0n_digits$}", nanoseconds / unit, nanoseconds % unit);
    Ok(number.trim_end_matches('0').trim_end_matches('.').to_owned())
}

/// Returns nanoseconds.
pub(super) fn parse(text: &str) -> Result<i64, Mismatch> {
    read(text).ok_or_else(|| Mismatch::custom(format_args!("{text:?} is not a duration such as \"1m30s\"")))
}

fn read(text: &str) -> Option<i64> {
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Some(0);
    }
    if rest.is_empty() {
        return None;
    }
    let mut total: i64 = 0;
    while !rest.is_empty() {
        let whole = take_digits(&mut rest);
        let fraction = match rest.strip_prefix('.') {
            Some(after) => {
                rest = after;
                take_digits(&mut rest)
            }
            None => "",
        };
        if whole.is_empty() && fraction.is_empty() {
            return None;
        }
        let (after, unit) = UNITS.iter().find_map(|(name, unit)| Some((rest.strip_prefix(name)?, *unit)))?;
        rest = after;
        let whole: i64 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
        total = total.checked_add(whole.checked_mul(unit)?)?.checked_add(fraction_of(fraction, unit)?)?;
    }
    Some(if negative { -total } else { total })
}

fn take_digits<'a>(rest: &mut &'a str) -> &'a str {
    let after = rest.trim_start_matches(|c: char| c.is_ascii_digit());
    let digits = rest.strip_suffix(after).unwrap_or_default();
    *rest = after;
    digits
}

/// Digits after the point, rounded down. Those that cannot matter for any unit are not looked at.
fn fraction_of(digits: &str, unit: i64) -> Option<i64> {
    const ENOUGH: usize = 18;
    let digits = digits.get(..ENOUGH).unwrap_or(digits);
    if digits.is_empty() {
        return Some(0);
    }
    let scale = 10_i128.pow(u32::try_from(digits.len()).ok()?);
    i64::try_from(digits.parse::<i128>().ok()? * i128::from(unit) / scale).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_writes_them() {
        for (text, wanted) in [
            ("0", Some(0)),
            ("-0", Some(0)),
            ("90s", Some(90 * SECOND)),
            ("1m30s", Some(90 * SECOND)),
            ("1.5h", Some(5_400 * SECOND)),
            (".5s", Some(SECOND / 2)),
            ("1.s", Some(SECOND)),
            ("-1s", Some(-SECOND)),
            ("100us1\u{b5}s1\u{3bc}s5ns", Some(102_005)),
            ("0.0000000019s", Some(1)),
            ("2562047h", Some(2_562_047 * 3_600 * SECOND)),
            ("2562048h", None),
            ("99999999999999999999s", None),
            ("", None),
            ("+", None),
            ("1", None),
            (".s", None),
            ("1d", None),
            ("1 s", None),
            ("s", None),
            ("1mx", None),
            ("1s ", None),
        ] {
            assert_eq!(parse(text).ok(), wanted, "{text}");
        }
    }

    #[test]
    fn units_are_printed_without_needless_zeros() {
        for (text, unit, wanted) in [
            ("90s", SECOND, "90"),
            ("100s", SECOND, "100"),
            ("0", SECOND, "0"),
            ("1500ms", SECOND, "1.5"),
            ("-1500ms", SECOND, "-1.5"),
            ("1ns", SECOND, "0.000000001"),
            ("50ms", MILLISECOND, "50"),
            ("50.25ms", MILLISECOND, "50.25"),
        ] {
            assert_eq!(in_units(text, unit).unwrap(), wanted, "{text}");
        }
    }
}
