//! Streams concatenate to the whole text, whatever the tokens, and stop strings cut exactly.

use proptest::prelude::*;

use super::*;

fn tokenizer(source: &str) -> &'static Tokenizer {
    &LOADED.iter().find(|loaded| loaded.source == source).unwrap().ours
}

/// Bytes as one-byte tokens: every byte-level vocabulary holds them all.
fn byte_ids(tokenizer: &Tokenizer, bytes: &[u8]) -> Vec<u32> {
    let id = |byte: &u8| {
        (0..tokenizer.vocab_size() as u32).find(|id| tokenizer.bytes(*id) == [*byte]).unwrap()
    };
    bytes.iter().map(id).collect()
}

fn stream(detokenizer: &mut Detokenizer, ids: &[u32]) -> (String, bool) {
    let mut text = String::new();
    for id in ids {
        let delta = detokenizer.push(*id);
        text.push_str(&delta.text);
        if delta.stopped {
            return (text, true);
        }
    }
    text.push_str(&detokenizer.finish());
    (text, false)
}

#[test]
fn split_characters_are_held_back() {
    let tokenizer = tokenizer(BYTE_LEVEL);
    let mut detokenizer = tokenizer.detokenizer(&[], TextStart::Fresh);
    let texts: Vec<String> = byte_ids(tokenizer, "é🦀!".as_bytes())
        .into_iter()
        .map(|id| detokenizer.push(id).text)
        .collect();
    assert_eq!(texts, ["", "é", "", "", "", "🦀", "!"]);
    assert_eq!((detokenizer.emitted_chars(), detokenizer.finish()), (3, String::new()));
}

#[test]
fn invalid_bytes_give_one_replacement_per_maximal_subpart() {
    let tokenizer = tokenizer(BYTE_LEVEL);
    for bytes in [
        &b"a\xf0\x9f\xa6b"[..],
        b"\xff\xfe",
        b"\xe4\xbd",
        b"\xf0\x80\x80\x41",
        b"\xc3\xc3\xa9",
        b"\xed\xa0\x80x",
    ] {
        let ids = byte_ids(tokenizer, bytes);
        let text = tokenizer.decode(&ids, TextStart::Fresh);
        assert_eq!(text, String::from_utf8_lossy(bytes), "{bytes:x?}");
    }
}

#[test]
fn control_tokens_and_unknown_ids_give_no_text() {
    let tokenizer = tokenizer(BYTE_LEVEL);
    let mut ids = tokenizer.encode_plain("Hello", false).unwrap();
    ids.insert(1, tokenizer.token_id("<|im_end|>").unwrap());
    ids.extend([999_999, u32::MAX]);
    assert_eq!(tokenizer.decode(&ids, TextStart::Fresh), "Hello");
    let think = tokenizer.token_id("<think>").unwrap();
    assert_eq!(tokenizer.decode(&[think], TextStart::Fresh), "<think>");
}

#[test]
fn sentencepiece_texts_lose_the_space_of_their_start_only() {
    for source in [LLAMA2, MISTRAL] {
        let tokenizer = tokenizer(source);
        let ids = tokenizer.encode_plain("Hello there 你\n", true).unwrap();
        assert_eq!(tokenizer.decode(&ids, TextStart::Fresh), "Hello there 你\n");
        assert_eq!(tokenizer.decode(&ids, TextStart::Continued), " Hello there 你\n");
        let mut detokenizer = tokenizer.detokenizer(&[], TextStart::Fresh);
        let mut bytes: Vec<u8> = Vec::new();
        for id in &ids {
            bytes.extend(detokenizer.bytes_of(*id));
            detokenizer.push(*id);
        }
        assert_eq!(bytes, "Hello there 你\n".as_bytes());
        let newline = tokenizer.token_id("<0x0A>").unwrap();
        assert_eq!(tokenizer.bytes(newline), b"\n");
    }
}

#[test]
fn a_stop_string_is_cut_inside_tokens() {
    let tokenizer = tokenizer(BYTE_LEVEL);
    let ids = tokenizer.encode_plain("The capital of France is Paris.", false).unwrap();
    let stops = ["ital of Fr".to_owned(), "zzz".to_owned()];
    let mut detokenizer = tokenizer.detokenizer(&stops, TextStart::Fresh);
    assert_eq!(stream(&mut detokenizer, &ids), ("The cap".to_owned(), true));
    assert_eq!(detokenizer.push(ids[0]), Delta { text: String::new(), stopped: true });
    assert_eq!(detokenizer.finish(), "");
}

#[test]
fn a_stop_prefix_is_returned_at_the_end() {
    let tokenizer = tokenizer(BYTE_LEVEL);
    let mut detokenizer = tokenizer.detokenizer(&["bcd".to_owned()], TextStart::Fresh);
    let ids = byte_ids(tokenizer, b"abc");
    let texts: Vec<String> = ids.iter().map(|id| detokenizer.push(*id).text).collect();
    assert_eq!(texts, ["a", "", ""]);
    assert_eq!(detokenizer.finish(), "bc");
    assert_eq!(detokenizer.emitted_chars(), 3);
}

#[test]
fn disarmed_stops_let_text_pass() {
    let tokenizer = tokenizer(BYTE_LEVEL);
    let mut detokenizer = tokenizer.detokenizer(&["b".to_owned()], TextStart::Fresh);
    detokenizer.arm_stops(false);
    let ids = byte_ids(tokenizer, b"ab");
    assert_eq!(detokenizer.push(ids[1]).text, "b");
    detokenizer.arm_stops(true);
    assert_eq!(detokenizer.push(ids[0]).text, "a");
    assert!(detokenizer.push(ids[1]).stopped);
}

#[test]
fn partial_tokens_show_escapes() {
    let tokenizer = tokenizer(BYTE_LEVEL);
    let ids = byte_ids(tokenizer, &[0xf0, b'a']);
    assert_eq!(tokenizer.display(ids[0]), "\\xf0");
    assert_eq!(tokenizer.display(ids[1]), "a");
    let control = tokenizer.token_id("<|eot_id|>").unwrap();
    assert_eq!(tokenizer.display(control), "<|eot_id|>");
}

/// Text up to the stop string that is complete first when read character by character.
fn cut(text: &str, stops: &[String]) -> (String, bool) {
    let ends = text.char_indices().map(|(at, c)| at + c.len_utf8());
    for end in ends {
        let longest =
            stops.iter().filter(|stop| text[..end].ends_with(*stop)).map(String::len).max();
        if let Some(len) = longest {
            return (text[..end - len].to_owned(), true);
        }
    }
    (text.to_owned(), false)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(crate::soak(512)))]

    #[test]
    fn any_ids_stream_to_the_lossy_text(
        ids in prop::collection::vec(0u32..460, 0..40),
        stops in prop::collection::vec("[a-c é]{1,3}", 0..4),
        sentencepiece in any::<bool>(),
    ) {
        let tokenizer = tokenizer(if sentencepiece { LLAMA2 } else { BYTE_LEVEL });
        let bytes: Vec<u8> = ids.iter().flat_map(|id| tokenizer.bytes(*id).to_vec()).collect();
        let whole = String::from_utf8_lossy(&bytes).into_owned();
        let mut detokenizer = tokenizer.detokenizer(&[], TextStart::Continued);
        prop_assert_eq!(stream(&mut detokenizer, &ids), (whole.clone(), false));
        let mut detokenizer = tokenizer.detokenizer(&stops, TextStart::Continued);
        let (text, stopped) = stream(&mut detokenizer, &ids);
        prop_assert_eq!(detokenizer.emitted_chars(), text.chars().count());
        prop_assert_eq!((text, stopped), cut(&whole, &stops));
    }

    #[test]
    fn stops_do_not_depend_on_how_the_text_is_cut(
        text in "[ab]{0,24}", stops in prop::collection::vec("[ab]{1,4}", 1..4),
    ) {
        let tokenizer = tokenizer(BYTE_LEVEL);
        let expected = cut(&text, &stops);
        let merged = tokenizer.encode_plain(&text, false).unwrap();
        for ids in [merged, byte_ids(tokenizer, text.as_bytes())] {
            let mut detokenizer = tokenizer.detokenizer(&stops, TextStart::Fresh);
            prop_assert_eq!(&stream(&mut detokenizer, &ids), &expected);
        }
    }

    #[test]
    fn encoded_text_comes_back(text in "\\PC{0,24}") {
        for Loaded { ours: tokenizer, library, .. } in LOADED.iter() {
            let ids = tokenizer.encode_plain(&text, false).unwrap();
            let decoded = tokenizer.decode(&ids, TextStart::Fresh);
            prop_assert_eq!(&decoded, &library.decode(&ids, true).unwrap());
            if !text.starts_with(' ') && !text.contains('▁') {
                prop_assert_eq!(&decoded, &text);
            }
        }
    }
}
