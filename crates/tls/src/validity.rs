//! When a certificate is valid: rustls checks that of others, but not of our own, which would only be found out by all
//! clients at once.

/// A certificate's times (RFC 5280, 4.1.2.5), as written there.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Validity {
    from: Time,
    until: Time,
}

/// A moment of UTC. The order of the fields is that of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Time {
    year: i64,
    month: u8,
    day: u8,
    second_of_day: u32,
}

const SEQUENCE: u8 = 0x30;
const INTEGER: u8 = 0x02;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const VERSION: u8 = 0xa0;

impl Validity {
    /// Reads the times out of a certificate in DER; `None` if it has another form, which rustls will say.
    pub(crate) fn of(certificate: &[u8]) -> Option<Self> {
        let (certificate, _) = element(certificate, SEQUENCE)?;
        let (mut fields, _) = element(certificate, SEQUENCE)?;
        if let Some((_version, rest)) = element(fields, VERSION) {
            fields = rest;
        }
        let (_serial, fields) = element(fields, INTEGER)?;
        let (_algorithm, fields) = element(fields, SEQUENCE)?;
        let (_issuer, fields) = element(fields, SEQUENCE)?;
        let (times, _) = element(fields, SEQUENCE)?;
        let (from, times) = Time::read(times)?;
        let (until, _) = Time::read(times)?;
        Some(Self { from, until })
    }

    /// What is wrong with it at a time, in seconds since 1970.
    pub(crate) fn trouble_at(&self, unix_s: i64) -> Option<String> {
        let now = Time::from_unix(unix_s);
        let date = |Time { year, month, day, .. }| format!("{year:04}-{month:02}-{day:02}");
        if now > self.until {
            return Some(format!("expired on {}", date(self.until)));
        }
        (now < self.from).then(|| format!("is not valid before {}", date(self.from)))
    }
}

impl Time {
    fn read(der: &[u8]) -> Option<(Self, &[u8])> {
        let (text, rest, year_digits) = match element(der, UTC_TIME) {
            Some((text, rest)) => (text, rest, 2),
            None => element(der, GENERALIZED_TIME).map(|(text, rest)| (text, rest, 4))?,
        };
        let text = std::str::from_utf8(text).ok()?;
        let number = |from: usize, digits: usize| text.get(from..from + digits)?.parse::<u32>().ok();
        let year = match (number(0, year_digits)?, year_digits) {
            (year @ 0..50, 2) => year + 2000,
            (year, 2) => year + 1900,
            (year, _) => year,
        };
        let part = |at: usize| number(year_digits + 2 * at, 2);
        let (month, day) = (u8::try_from(part(0)?).ok()?, u8::try_from(part(1)?).ok()?);
        let second_of_day = part(2)? * 3600 + part(3)? * 60 + part(4)?;
        Some((Self { year: year.into(), month, day, second_of_day }, rest))
    }

    /// The civil date of a day count, after Howard Hinnant ("chrono-compatible low-level date algorithms").
    fn from_unix(unix_s: i64) -> Self {
        let days = unix_s.div_euclid(86_400) + 719_468; // since March 1st of the year 0
        let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        Self {
            year: year_of_era + era * 400 + i64::from(month <= 2),
            month: month as u8,
            day: day as u8,
            second_of_day: unix_s.rem_euclid(86_400) as u32,
        }
    }
}

/// The content of the DER element that `der` begins with, if it has this tag, and what follows it.
fn element(der: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (&found, der) = der.split_first()?;
    let (&first, der) = der.split_first()?;
    if found != tag {
        return None;
    }
    let (length, der) = match first {
        0..=0x7f => (usize::from(first), der),
        0x81..=0x84 => {
            let (bytes, der) = der.split_at_checked(usize::from(first - 0x80))?;
            (bytes.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)), der)
        }
        _ => return None,
    };
    der.split_at_checked(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_counted_as_the_calendar_does() {
        for (unix_s, year, month, day, second_of_day) in [
            (0, 1970, 1, 1, 0),
            (951_782_400, 2000, 2, 29, 0),
            (951_868_799, 2000, 2, 29, 86_399),
            (4_107_542_399, 2100, 2, 28, 86_399),
            (4_107_542_400, 2100, 3, 1, 0),
            (-1, 1969, 12, 31, 86_399),
        ] {
            assert_eq!(Time::from_unix(unix_s), Time { year, month, day, second_of_day });
        }
    }

    #[test]
    fn times_are_read_in_both_forms_and_nonsense_is_none() {
        let utc = b"\x17\x0d491231235959Zrest";
        let (time, rest) = Time::read(utc).unwrap();
        assert_eq!(
            (time, rest),
            (Time { year: 2049, month: 12, day: 31, second_of_day: 86_399 }, &b"rest"[..])
        );
        let general = b"\x18\x0f20500101000000Z";
        assert_eq!(Time::read(general).unwrap().0, Time { year: 2050, month: 1, day: 1, second_of_day: 0 });
        for length in 0..utc.len() - 4 {
            assert_eq!(Time::read(&utc[..length]), None);
        }
        assert_eq!(Validity::of(b""), None);
        assert_eq!(element(b"\x30\x84\xff\xff\xff\xff", SEQUENCE), None);
    }
}
