use std::ops::Range;
use std::sync::{Arc, LazyLock};

use compact_str::CompactString;
use galerne_text::{Detokenizer, Tokenizer};
use proptest::prelude::*;

use crate::models::{bard, bard_path, mistral};

static BARD: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| Arc::new(bard()));
static MISTRAL: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| Arc::new(mistral("v3")));

/// All pieces of `ids`, put together, and whether a stop string ended them.
fn stream(detokenizer: &mut Detokenizer, ids: &[u32]) -> (String, bool) {
    let mut text = String::new();
    let mut stopped = false;
    for &id in ids {
        let piece = detokenizer.push(id);
        assert!(!stopped || piece.text.is_empty() && piece.stopped, "nothing follows a stop");
        text.push_str(&piece.text);
        stopped = piece.stopped;
    }
    text.push_str(&detokenizer.finish());
    (text, stopped)
}

/// The first stop string to end in `text`, by definition; of two that end together, the one that begins first.
fn stop_in(text: &str, stop: &[String]) -> Option<Range<usize>> {
    let ends = text.char_indices().map(|(at, c)| at + c.len_utf8());
    ends.filter_map(|end| {
        let starts = stop.iter().filter(|s| text[..end].ends_with(s.as_str())).map(|s| end - s.len());
        starts.min().map(|start| start..end)
    })
    .next()
}

/// Ids that make half characters, spaces at every place, byte tokens and special tokens likely.
fn some_ids(vocab_size: u32) -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(prop_oneof![0..8u32, 0..300u32, 700..1024u32, 0..vocab_size], 0..40)
}

fn tokenizer(sentencepiece: bool) -> Arc<Tokenizer> {
    Arc::clone(if sentencepiece { &MISTRAL } else { &BARD })
}

proptest! {
    #[test]
    fn pieces_make_up_the_whole_text(sp in any::<bool>(), ids in some_ids(33_000), skip in any::<bool>()) {
        let tokenizer = tokenizer(sp);
        let whole = tokenizer.decode(&ids, skip);
        let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer), &[], vec![], skip);
        prop_assert_eq!(stream(&mut detokenizer, &ids), (whole, false));
    }

    #[test]
    fn an_answer_is_what_the_text_has_more_than_the_prompt(prompt in 1usize..20, ids in some_ids(33_000)) {
        prop_assume!(prompt < ids.len() && !MISTRAL.is_special(ids[prompt - 1]) && !MISTRAL.token_bytes(ids[prompt - 1]).is_empty());
        let (before, whole) = (MISTRAL.decode(&ids[..prompt], true), MISTRAL.decode(&ids, true));
        prop_assume!(whole.starts_with(&before) && !before.ends_with('\u{fffd}'));
        let mut detokenizer = Detokenizer::new(Arc::clone(&MISTRAL), &ids[..prompt], vec![], true);
        prop_assert_eq!(stream(&mut detokenizer, &ids[prompt..]).0, &whole[before.len()..]);
    }

    #[test]
    fn a_stop_string_ends_the_text_and_never_leaks(
        sp in any::<bool>(),
        ids in some_ids(33_000),
        made_up in prop::collection::vec("[ae s\u{fffd}]{0,3}", 0..3),
        cuts in prop::collection::vec((any::<prop::sample::Index>(), 1usize..12), 0..3),
        including in any::<bool>(),
        markers in prop::collection::vec(0..16u32, 0..6),
    ) {
        let tokenizer = tokenizer(sp);
        let detokenizer =
            |stop| Detokenizer::new(Arc::clone(&tokenizer), &[], stop, true).spelling_out(&markers);
        let (whole, _) = stream(&mut detokenizer(vec![]), &ids);
        let chars = whole.chars().collect::<Vec<_>>();
        let mut stop = made_up;
        stop.extend(cuts.iter().filter(|_| !chars.is_empty()).map(|(at, len)| {
            chars.iter().skip(at.index(chars.len())).take(*len).collect::<String>()
        }));
        let mut stopping = detokenizer(stop.clone()).including_stop(including);
        stop.retain(|s| !s.is_empty());
        let met = stop_in(&whole, &stop);
        let mut text = String::new();
        for &id in &ids {
            let piece = stopping.push(id);
            let before = met.as_ref().map_or(whole.len(), |met| met.start);
            prop_assert!(piece.stopped || text.len() + piece.text.len() <= before, "part of a stop string");
            text += &piece.text;
            if piece.stopped {
                break;
            }
        }
        text += &stopping.finish();
        let end = met.map_or(whole.len(), |met| if including { met.end } else { met.start });
        prop_assert_eq!(&text, &whole[..end]);
    }

    #[test]
    fn what_a_stop_string_ends_does_not_depend_on_the_tokens(
        parts in prop::collection::vec("[ab é\n]{1,4}", 1..12),
        stop in prop::collection::vec("[ab é\n]{1,5}", 1..3),
        including in any::<bool>(),
    ) {
        let cut = parts.iter().flat_map(|part| BARD.encode_plain(part).expect("ids")).collect::<Vec<_>>();
        let text = parts.concat();
        let answer = |ids: &[u32]| {
            let detokenizer = Detokenizer::new(Arc::clone(&BARD), &[], stop.clone(), true);
            stream(&mut detokenizer.including_stop(including), ids).0
        };
        let met = stop_in(&text, &stop);
        let end = met.map_or(text.len(), |met| if including { met.end } else { met.start });
        prop_assert_eq!(answer(&cut), &text[..end]);
        prop_assert_eq!(answer(&BARD.encode_plain(&text).expect("ids")), &text[..end]);
    }

    #[test]
    fn marks_are_spelled_out_among_special_tokens(sp in any::<bool>(), ids in some_ids(33_000)) {
        let tokenizer = tokenizer(sp);
        let text = |markers: &[u32]| {
            let detokenizer = Detokenizer::new(Arc::clone(&tokenizer), &[], vec![], true);
            stream(&mut detokenizer.spelling_out(markers), &ids).0
        };
        prop_assert_eq!(text(&ids), tokenizer.decode(&ids, false), "all");
        prop_assert_eq!(text(&[]), tokenizer.decode(&ids, true), "none");
    }

    #[test]
    fn byte_level_text_is_hugging_faces(ids in some_ids(1024), skip in any::<bool>()) {
        static REFERENCE: LazyLock<tokenizers::Tokenizer> =
            LazyLock::new(|| tokenizers::Tokenizer::from_file(bard_path()).expect("bard-1m's tokenizer"));
        prop_assert_eq!(BARD.decode(&ids, skip), REFERENCE.decode(&ids, skip).expect("text"));
    }
}

#[test]
fn a_character_waits_for_its_last_byte() {
    let ids = MISTRAL.encode_plain("🦀").expect("bytes");
    let mut detokenizer = Detokenizer::new(Arc::clone(&MISTRAL), &[], vec![], true);
    let texts = ids.iter().map(|&id| detokenizer.push(id).text).collect::<Vec<_>>();
    assert_eq!(texts.concat(), "🦀");
    assert_eq!(texts.last().map(|text| &**text), Some("🦀"));

    detokenizer.push(ids[ids.len() - 4]);
    assert_eq!(detokenizer.finish(), "\u{fffd}", "a character that was never finished");
}

#[test]
fn the_first_space_is_silent_only_where_no_text_stands_before_it() {
    let time = MISTRAL.encode_plain("time").expect("a word");
    let answer = |prompt_tail: &[u32]| {
        stream(&mut Detokenizer::new(Arc::clone(&MISTRAL), prompt_tail, vec![], true), &time).0
    };
    assert_eq!(answer(&[]), "time");
    assert_eq!(answer(&[1]), "time", "after BOS");
    assert_eq!(answer(&[1, 3, 4]), "time", "after [/INST]");
    assert_eq!(answer(&MISTRAL.encode_plain("Once upon a").expect("words")), " time");
}

#[test]
fn text_that_may_become_a_stop_string_is_held_back() {
    let mut detokenizer =
        Detokenizer::new(Arc::clone(&BARD), &[], vec!["\n\nEND".into(), "\n\n\n".into()], true);
    let mut push = |text: &str| {
        let ids = BARD.encode_plain(text).expect("ids");
        ids.iter()
            .map(|&id| detokenizer.push(id))
            .map(|piece| (piece.text, piece.stopped))
            .reduce(|a, b| (a.0 + &b.0, b.1))
    };
    assert_eq!(push("a\n"), Some(("a".into(), false)));
    assert_eq!(push("b\n\nEN"), Some(("\nb".into(), false)));
    assert_eq!(push("\n"), Some(("\n\nEN".into(), false)));
    assert_eq!(push("\nE"), Some((CompactString::default(), false)));
    assert_eq!(push("ND more"), Some((CompactString::default(), true)));
    assert_eq!(detokenizer.finish(), "");
}

#[test]
fn a_stop_string_within_the_first_tokens_is_text() {
    let ids = BARD.encode_plain("xyxyxy").expect("ids");
    assert_eq!(ids.len(), 6);
    let text = |min_tokens| {
        let detokenizer = Detokenizer::new(Arc::clone(&BARD), &[], vec!["xy".into()], true);
        stream(&mut detokenizer.with_min_tokens(min_tokens), &ids)
    };
    assert_eq!(text(0), (String::new(), true));
    assert_eq!(text(1), (String::new(), true));
    assert_eq!(text(2), ("xy".into(), true));
    assert_eq!(text(5), ("xyxy".into(), true));
    assert_eq!(text(6), ("xyxyxy".into(), false));
}
