//! What Python's standard library does for Jinja templates, to the letter.

use minijinja::value::Kwargs;
use minijinja::{Error, ErrorKind, State, Value};

use crate::python_json::PythonJson;

/// JSON that `tojson` writes at once.
const JSON_BYTES_MAX: usize = 16 << 20;
/// JSON that one unit of fuel pays for, as in the engine's own filter.
const FUEL_JSON_BYTES: u64 = 4;

/// The filter `tojson` of transformers: `json.dumps(value, ensure_ascii, indent, separators, sort_keys)`.
pub(super) fn to_json(state: &State, value: &Value, options: &Kwargs) -> Result<String, Error> {
    let indent = options.get::<Option<usize>>("indent")?;
    let separators = match options.get::<Option<Vec<String>>>("separators")?.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators must be two strings"));
        }
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    let ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    let bad = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    let write = || PythonJson::new(separators.clone(), indent, ascii);
    let json = write().write_within(value, JSON_BYTES_MAX).map_err(bad)?;
    state.consume_fuel(json.len() as u64 / FUEL_JSON_BYTES)?;
    if !sort_keys {
        return Ok(json);
    }
    let mut sorted = serde_json::to_value(value).map_err(bad)?;
    sorted.sort_all_objects();
    write().write_within(&sorted, JSON_BYTES_MAX).map_err(bad)
}

const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// `datetime.strftime` in UTC for `seconds` after 1970, for the directives that templates use to tell the
/// model the date; others are left as they are.
pub(super) fn strftime(format: &str, seconds: u64) -> String {
    let days = seconds / 86_400;
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let (year, month, day) = civil(days);
    let month_name = MONTHS[(month - 1) as usize];
    let day_name = DAYS[(days % 7) as usize];
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match rest.next() {
            Some('Y') => out += &year.to_string(),
            Some('y') => out += &format!("{:02}", year % 100),
            Some('m') => out += &format!("{month:02}"),
            Some('d') => out += &format!("{day:02}"),
            Some('H') => out += &format!("{hour:02}"),
            Some('I') => out += &format!("{:02}", (hour + 11) % 12 + 1),
            Some('p') => out += if hour < 12 { "AM" } else { "PM" },
            Some('M') => out += &format!("{minute:02}"),
            Some('S') => out += &format!("{second:02}"),
            Some('B') => out += month_name,
            Some('b') => out += &month_name[..3],
            Some('A') => out += day_name,
            Some('a') => out += &day_name[..3],
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

/// Year, month and day of the Gregorian calendar, `days` after 1970-01-01 (Hinnant, "chrono-compatible
/// low-level date algorithms", `civil_from_days`).
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_python() {
        let format = "%d %b %Y|%A %a %B|%y-%m-%d %H:%M:%S|%I %p|%%|%q";
        assert_eq!(strftime(format, 0), "01 Jan 1970|Thursday Thu January|70-01-01 00:00:00|12 AM|%|%q");
        assert_eq!(
            strftime(format, 951_825_599),
            "29 Feb 2000|Tuesday Tue February|00-02-29 11:59:59|11 AM|%|%q"
        );
        assert_eq!(
            strftime(format, 4_102_444_800 + 43_200),
            "01 Jan 2100|Friday Fri January|00-01-01 12:00:00|12 PM|%|%q"
        );
    }
}
