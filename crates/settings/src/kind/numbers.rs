//! Numbers in all the ways an operator may write them.

use crate::value::{LogRate, RateUnit, Value};

/// Parses a signed integer whose prefix tells the base: `0x`, `0o`, `0b`, a leading zero for octal.
/// Single underscores between digits are allowed.
pub(super) fn integer(text: &str) -> Result<i64, String> {
    parse_integer(text).ok_or_else(|| "not a whole number".to_owned())
}

fn parse_integer(text: &str) -> Option<i64> {
    let (sign, digits) = match text.strip_prefix('-') {
        Some(rest) => ("-", rest),
        None => ("", text.strip_prefix('+').unwrap_or(text)),
    };
    let lower = digits.to_ascii_lowercase();
    let (base, digits, prefixed) = if let Some(rest) = lower.strip_prefix("0x") {
        (16, rest, true)
    } else if let Some(rest) = lower.strip_prefix("0o") {
        (8, rest, true)
    } else if let Some(rest) = lower.strip_prefix("0b") {
        (2, rest, true)
    } else if lower.len() > 1
        && let Some(rest) = lower.strip_prefix('0')
    {
        (8, rest, true)
    } else {
        (10, lower.as_str(), false)
    };
    // An underscore follows a digit or the prefix and precedes a digit.
    if digits.contains("__") || digits.ends_with('_') || (digits.starts_with('_') && !prefixed) {
        return None;
    }
    let plain: String = digits.chars().filter(|c| *c != '_').collect();
    if !plain.chars().all(|c| c.is_digit(base)) {
        return None; // `from_str_radix` would take another sign
    }
    i64::from_str_radix(&format!("{sign}{plain}"), base).ok()
}

/// Parses a finite decimal number.
pub(super) fn seconds(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| number.is_finite());
    number.ok_or_else(|| "not a number of seconds or milliseconds".to_owned())
}

/// Parses a mask of at least two bits.
pub(super) fn mark_mask(text: &str) -> Result<Value, String> {
    let number = integer(text)?;
    let mask = u32::try_from(number).map_err(|_| "not a 32-bit number".to_owned())?;
    if mask.count_ones() < 2 {
        return Err("fewer than two bits are set".to_owned());
    }
    Ok(Value::Number(number))
}

/// Parses `10/minute`.
pub(super) fn log_rate(text: &str) -> Result<Value, String> {
    let parse = || {
        let (count, unit) = text.split_once('/')?;
        let plain =
            (1..=4).contains(&count.len()) && !count.starts_with('0') && count.bytes().all(|b| b.is_ascii_digit());
        let unit = match unit {
            "second" => RateUnit::Second,
            "minute" => RateUnit::Minute,
            "hour" => RateUnit::Hour,
            "day" => RateUnit::Day,
            _ => return None,
        };
        Some(LogRate { count: count.parse().ok().filter(|_| plain)?, unit })
    };
    parse().map(Value::Rate).ok_or_else(|| "not of the form <1 to 9999>/<second, minute, hour or day>".to_owned())
}

/// Parses a DiffServ code point, a number or a name.
pub(super) fn dscp(text: &str) -> Result<Value, String> {
    let number = match text.to_ascii_uppercase().as_str() {
        "DF" | "CS0" => Some(0),
        "EF" => Some(46),
        name => match name.as_bytes() {
            [b'C', b'S', class @ b'1'..=b'7'] => Some(8 * i64::from(class - b'0')),
            // Assured forwarding: class 1 to 4, drop precedence 1 to 3.
            [b'A', b'F', class @ b'1'..=b'4', drop @ b'1'..=b'3'] => {
                Some(8 * i64::from(class - b'0') + 2 * i64::from(drop - b'0'))
            }
            _ => integer(text).ok(),
        },
    };
    number
        .filter(|number| (0..=63).contains(number))
        .map(Value::Number)
        .ok_or_else(|| "neither 0 to 63 nor the name of a code point".to_owned())
}
