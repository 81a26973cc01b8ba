//! Avro's logical types as JSON. Numbers are exact, and times are in the forms of RFC 3339.

use std::fmt::Display;
use std::io::Write;

use jiff::civil;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use num_bigint::{BigInt, Sign};

use super::decode::DecodeError;
use super::plan::Unit;

type Result = std::result::Result<(), Box<DecodeError>>;

/// The longest unscaled value in bytes, and the largest scale: making digits of more takes too long.
const MAX_DECIMAL: usize = 1024;

fn quoted(value: impl Display, out: &mut Vec<u8>) {
    // Writing to memory does not fail.
    let _ = write!(out, "\"{value}\"");
}

/// An exact number: `unscaled` (big-endian, two's complement) × 10^-`scale`.
pub fn decimal(unscaled: &[u8], scale: i64, out: &mut Vec<u8>) -> Result {
    if unscaled.len() > MAX_DECIMAL || scale.unsigned_abs() > MAX_DECIMAL as u64 {
        return Err(DecodeError::new(format!("a decimal has more than {MAX_DECIMAL} bytes or places")));
    }
    let (negative, mut digits) = if unscaled.len() <= 16 {
        let fill = if unscaled.first().is_some_and(|&first| first >= 0x80) { 0xff } else { 0 };
        let mut bytes = [fill; 16];
        bytes[16 - unscaled.len()..].copy_from_slice(unscaled);
        let value = i128::from_be_bytes(bytes);
        (value < 0, value.unsigned_abs().to_string())
    } else {
        let value = BigInt::from_signed_bytes_be(unscaled);
        (value.sign() == Sign::Minus, value.magnitude().to_string())
    };
    let places = scale.max(0) as usize;
    if scale < 0 && digits != "0" {
        digits.push_str(&"0".repeat(scale.unsigned_abs() as usize));
    }
    if digits.len() <= places {
        digits.insert_str(0, &"0".repeat(places + 1 - digits.len()));
    }
    if negative {
        out.push(b'-');
    }
    let (whole, fraction) = digits.split_at(digits.len() - places);
    out.extend_from_slice(whole.as_bytes());
    if places > 0 {
        out.push(b'.');
        out.extend_from_slice(fraction.as_bytes());
    }
    Ok(())
}

/// A UUID in the form of RFC 9562.
pub fn uuid(bytes: &[u8], out: &mut Vec<u8>) -> Result {
    let bytes: [u8; 16] = bytes
        .try_into()
        .map_err(|_| DecodeError::new(format!("a uuid has {} bytes, not 16", bytes.len())))?;
    let hex = format!("{:032x}", u128::from_be_bytes(bytes));
    quoted(
        format_args!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]),
        out,
    );
    Ok(())
}

/// A day, counted from 1970-01-01.
pub fn date(days: i32, out: &mut Vec<u8>) -> Result {
    let midnight = Timestamp::from_second(i64::from(days) * 86_400)
        .map_err(|_| DecodeError::new(format!("the date {days} is not in the years -9999 to 9999")))?;
    quoted(midnight.to_zoned(TimeZone::UTC).date(), out);
    Ok(())
}

/// A time of day.
pub fn time(count: i64, unit: Unit, out: &mut Vec<u8>) -> Result {
    let since_midnight = match unit {
        Unit::Millis => SignedDuration::from_millis(count),
        Unit::Micros => SignedDuration::from_micros(count),
        Unit::Nanos => SignedDuration::from_nanos(count),
    };
    let time = civil::Time::midnight().checked_add(since_midnight).ok().filter(|_| count >= 0);
    let time =
        time.ok_or_else(|| DecodeError::new(format!("the time of day {count} is not within a day")))?;
    quoted(time, out);
    Ok(())
}

/// A point in time, with `Z`; `local`: a date and a time without a zone.
pub fn timestamp(count: i64, unit: Unit, local: bool, out: &mut Vec<u8>) -> Result {
    let at = match unit {
        Unit::Millis => Timestamp::from_millisecond(count),
        Unit::Micros => Timestamp::from_microsecond(count),
        Unit::Nanos => Timestamp::from_nanosecond(i128::from(count)),
    };
    let at =
        at.map_err(|_| DecodeError::new(format!("the time {count} is not in the years -9999 to 9999")))?;
    if local {
        quoted(at.to_zoned(TimeZone::UTC).datetime(), out)
    } else {
        quoted(at, out)
    }
    Ok(())
}

/// Months, days and milliseconds, which do not convert to each other.
pub fn duration(parts: &[u8; 12], out: &mut Vec<u8>) {
    let part = |i: usize| u32::from_le_bytes([parts[i], parts[i + 1], parts[i + 2], parts[i + 3]]);
    let _ = write!(out, r#"{{"months":{},"days":{},"milliseconds":{}}}"#, part(0), part(4), part(8));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(write: impl FnOnce(&mut Vec<u8>) -> Result) -> String {
        let mut out = Vec::new();
        match write(&mut out) {
            Ok(()) => String::from_utf8(out).unwrap(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn decimals_are_exact() {
        let of = |unscaled: &[u8], scale| text(|out| decimal(unscaled, scale, out));
        assert_eq!(of(&[0x04, 0xd2], 2), "12.34");
        assert_eq!(of(&[0xfb, 0x2e], 2), "-12.34");
        assert_eq!(of(&[5], 3), "0.005");
        assert_eq!(of(&[0xfb], 3), "-0.005");
        assert_eq!(of(&[], 0), "0");
        assert_eq!(of(&[], 2), "0.00");
        assert_eq!(of(&[7], -3), "7000");
        // 2^135 = 43556142965880123323311949751266331066368.
        let mut large = [0; 18];
        large[1] = 0x80;
        assert_eq!(of(&large, 1), "4355614296588012332331194975126633106636.8");
        assert!(of(&[1; 1025], 0).contains("1024"));
        assert!(of(&[1], 1 << 40).contains("1024"));
    }

    #[test]
    fn times_have_the_forms_of_rfc_3339() {
        assert_eq!(text(|out| date(20_484, out)), "\"2026-01-31\"");
        assert_eq!(text(|out| date(-1, out)), "\"1969-12-31\"");
        assert!(text(|out| date(i32::MAX, out)).contains("9999"));
        assert_eq!(text(|out| time(45_296_789, Unit::Millis, out)), "\"12:34:56.789\"");
        assert_eq!(text(|out| time(1, Unit::Micros, out)), "\"00:00:00.000001\"");
        assert!(text(|out| time(86_400_000, Unit::Millis, out)).contains("within a day"));
        assert!(text(|out| time(-1, Unit::Millis, out)).contains("within a day"));
        let at = |count, unit, local| text(|out| timestamp(count, unit, local, out));
        assert_eq!(at(1_769_860_800_123, Unit::Millis, false), "\"2026-01-31T12:00:00.123Z\"");
        assert_eq!(at(1_769_860_800_000_001, Unit::Micros, false), "\"2026-01-31T12:00:00.000001Z\"");
        assert_eq!(at(1_769_860_800_000_000_000, Unit::Nanos, true), "\"2026-01-31T12:00:00\"");
        assert_eq!(at(-1, Unit::Millis, false), "\"1969-12-31T23:59:59.999Z\"");
        assert!(at(i64::MAX, Unit::Millis, false).contains("9999"));
    }

    #[test]
    fn uuids_and_durations() {
        let bytes: Vec<u8> = (0..16).collect();
        assert_eq!(text(|out| uuid(&bytes, out)), "\"00010203-0405-0607-0809-0a0b0c0d0e0f\"");
        assert!(text(|out| uuid(&bytes[1..], out)).contains("15 bytes"));
        let parts = [1, 0, 0, 0, 2, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];
        let of = text(|out| {
            duration(&parts, out);
            Ok(())
        });
        assert_eq!(of, r#"{"months":1,"days":2,"milliseconds":4294967295}"#);
    }
}
