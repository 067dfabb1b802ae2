//! JSON inside frames: checked, not parsed.

use serde::de::IgnoredAny;

use crate::limits::UPDATE_DEPTH_MAX;

/// Whether `text` is JSON that any client can parse, nested no deeper than [`UPDATE_DEPTH_MAX`].
///
/// Half a surrogate pair (`"\ud83d"`) is fine, as it is in JavaScript: a name that was cut in the
/// middle of an emoji. Takes no stack for nesting.
pub fn is_json(text: &str) -> bool {
    depth(text) <= UPDATE_DEPTH_MAX && serde_json::from_str::<IgnoredAny>(text).is_ok()
}

/// How deep brackets are nested, if `text` is JSON.
fn depth(text: &str) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    let (mut in_string, mut escaped) = (false, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_string,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_of_presence_passes() {
        let user =
            r##"{"user":{"name":"A \"B\" [[","color":"#fff"},"cursor":null,"n":[1,-2.5e3]}"##;
        for text in ["null", "{}", "\"\"", r#""\ud83d""#, user] {
            assert!(is_json(text), "{text}");
        }
    }

    #[test]
    fn what_clients_cannot_parse_is_refused() {
        for text in [
            "",
            "undefined",
            "{",
            "nul",
            "{\"a\":}",
            "[1,]",
            "{} {}",
            "\"\u{1}\"",
            "'a'",
        ] {
            assert!(!is_json(text), "{text}");
        }
    }

    #[test]
    fn nesting_is_bounded() {
        let nested = |depth| ["[".repeat(depth), "]".repeat(depth)].concat();
        assert!(is_json(&nested(UPDATE_DEPTH_MAX)));
        assert!(!is_json(&nested(UPDATE_DEPTH_MAX + 1)));
        assert!(!is_json(&"[".repeat(1_000_000)));
        assert!(!is_json(&"{\"\":".repeat(100_000)));
        // Brackets in strings, also after an escaped quote, do not count.
        assert!(is_json(&format!("\"\\\"{}\"", "[".repeat(1000))));
    }
}
