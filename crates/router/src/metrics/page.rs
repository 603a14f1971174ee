//! Prometheus' text format, version 0.0.4.

use std::fmt::{Display, Write as _};

use super::instruments::Histogram;

/// What a page is, in HTTP's words.
pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Labels of a sample, by name.
pub(super) type Labels<'a> = &'a [(&'a str, &'a str)];

/// A page of metrics, family by family.
#[derive(Default)]
pub(super) struct Page {
    text: String,
    name: &'static str,
    /// The family's first lines; written with its first sample, so that an empty family leaves no trace.
    head: Option<String>,
}

impl Page {
    /// The samples that follow are of this family. The name of a counter ends in `_total`.
    pub(super) fn family(&mut self, name: &'static str, kind: &str, help: &str) {
        self.name = name;
        self.head = Some(format!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
    }

    pub(super) fn sample(&mut self, labels: Labels<'_>, value: impl Display) {
        self.line("", labels, None, &value);
    }

    pub(super) fn histogram(&mut self, labels: Labels<'_>, histogram: &Histogram) {
        let (bounds, counts, sum) = histogram.read();
        self.buckets(labels, bounds, &counts, sum);
    }

    /// A histogram by its upper bounds and the counts between them, the last one beyond all bounds.
    pub(super) fn buckets(&mut self, labels: Labels<'_>, bounds: &[f64], counts: &[u64], sum: f64) {
        let mut total = 0;
        let names = bounds.iter().map(f64::to_string).chain(std::iter::once("+Inf".to_owned()));
        for (bound, count) in names.zip(counts) {
            total += count;
            self.line("_bucket", labels, Some(&bound), &total);
        }
        self.line("_sum", labels, None, &sum);
        self.line("_count", labels, None, &total);
    }

    pub(super) fn into_text(self) -> String {
        self.text
    }

    fn line(&mut self, ending: &str, labels: Labels<'_>, bound: Option<&str>, value: &dyn Display) {
        if let Some(head) = self.head.take() {
            self.text.push_str(&head);
        }
        self.text.push_str(self.name);
        self.text.push_str(ending);
        let labels = labels.iter().copied().chain(bound.map(|bound| ("le", bound)));
        let mut opened = false;
        for (name, value) in labels {
            self.text.push_str(if opened { "," } else { "{" });
            opened = true;
            // Writing to a string cannot fail.
            let _ = write!(self.text, "{name}=\"{}\"", Escaped(value));
        }
        let _ = writeln!(self.text, "{} {value}", if opened { "}" } else { "" });
    }
}

/// A label's value as the format wants it.
struct Escaped<'a>(&'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.chars().try_for_each(|c| match c {
            '\\' => out.write_str("\\\\"),
            '"' => out.write_str("\\\""),
            '\n' => out.write_str("\\n"),
            c => out.write_char(c),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_as_prometheus_reads_it() {
        let mut page = Page::default();
        page.family("empty", "gauge", "Nothing.");
        page.family("asked_total", "counter", "Questions.");
        page.sample(&[("who", "a \"b\"\n\\")], 3);
        page.family("took_seconds", "histogram", "Time.");
        page.buckets(&[("who", "me")], &[0.5, 1.0], &[1, 0, 2], 9.5);
        let expected = "# HELP asked_total Questions.\n# TYPE asked_total counter\n\
            asked_total{who=\"a \\\"b\\\"\\n\\\\\"} 3\n\
            # HELP took_seconds Time.\n# TYPE took_seconds histogram\n\
            took_seconds_bucket{who=\"me\",le=\"0.5\"} 1\ntook_seconds_bucket{who=\"me\",le=\"1\"} 1\n\
            took_seconds_bucket{who=\"me\",le=\"+Inf\"} 3\n\
            took_seconds_sum{who=\"me\"} 9.5\ntook_seconds_count{who=\"me\"} 3\n";
        assert_eq!(page.into_text(), expected);
    }
}
