//! A device that records graphs and works ahead of the host: padded decode steps and launches
//! before results are handed out change no text, no token and no loss.

use crate::common::jobs::{Job, validation};
use crate::common::reading::{Reader, blocks, logits};
use crate::common::rig::{Answer, Rig, choice, options, request, tokenizer};
use crate::common::{Adapter, Random, bits, model, place, sizes};
use kernels::Module;
use worker::engine::command::{Finish, JobEvent, Purpose, SamplingSpec, Target};
use worker::model::{Batch, bucket};
use worker::text::TextStart;

const BASE: &str = "llama3";

#[test]
fn padded_decodes_give_the_bits_of_plain_ones() {
    for (base, adapters) in [("qwen3", true), ("odd", false)] {
        for count in [1, 3, 5, 9] {
            let mut model = model::<f32>(base, 1, sizes());
            let all: Vec<u32> = (0..model.sizes.blocks as u32).collect();
            model.poison_blocks(&all).unwrap();
            let mut random = Random::new(count as u64);
            if adapters {
                place(&mut model, 0, 0, &Adapter::random(base, 3, &Module::ALL, 1));
                place(&mut model, 1, 20, &Adapter::random(base, 16, &[Module::V], 2));
            }
            let size = model.sizes.block_size;
            let mut readers: Vec<Reader> = (0..count)
                .map(|at| {
                    let adapter = [Some((0, 3)), None, Some((1, 16))][at % 3];
                    let tokens = random.tokens(3 + 2 * at);
                    let held = blocks(5 * at as u32, tokens.len(), size);
                    Reader::new(&tokens, adapter.filter(|_| adapters), held)
                })
                .collect();
            let mut prefill = Batch::default();
            for reader in &mut readers {
                reader.append(&mut prefill, reader.tokens.len() - 1, size);
            }
            model.forward(&prefill).unwrap();
            let mut batch = Batch::default();
            for reader in &mut readers {
                reader.append(&mut batch, 1, size);
            }
            assert!(batch.is_decode() && !prefill.is_decode());
            model.forward(&batch).unwrap();
            let plain = logits(&mut model, &batch);
            batch.pad(bucket(count, model.sizes.sequences), model.sizes.max_rank);
            assert!(batch.is_decode());
            model.decode(&batch).unwrap();
            let padded = model.logits(count).unwrap().wait().unwrap();
            assert_eq!(bits(&plain), bits(&padded), "{base}, {count} sequences");
        }
    }
}

/// Chats that end in all ways, through adapters and without, beside two jobs. Without `polls`: on a
/// device that works while the engine waits; else on one that works ahead.
fn answers(polls: Option<usize>, stop: &[String], end: u32) -> (Vec<Answer>, [Vec<JobEvent>; 2]) {
    let mut options = options();
    options.graphs = polls.is_some();
    let mut rig = Rig::late(BASE, sizes(), options, polls.unwrap_or(0));
    rig.library.insert("a".to_owned(), Adapter::random(BASE, 5, &Module::ALL, 1));
    let mut second = Job::new("ftjob-b", BASE, 3, &[Module::Q, Module::Up]);
    second.validation = validation(4);
    rig.start(&Job::new("ftjob-a", BASE, 4, &Module::ALL));
    rig.start(&second);
    let keys: Vec<_> = (0..14)
        .map(|at| {
            let target = match at % 3 {
                0 => Target::Adapter("a".to_owned()),
                _ => Target::Base,
            };
            let prompt = if at < 2 { vec![4, 8, 15] } else { Random::new(at).tokens(at as usize) };
            let mut admission = request(target, &prompt, 9 + at as u32);
            let sampling = admission.sampling.clone();
            admission.sampling = match at {
                3..6 => SamplingSpec { temperature: 1.0, seed: at as i64, ..sampling },
                6 => SamplingSpec { logprobs: Some(2), ..sampling },
                7 => SamplingSpec { repetition_penalty: 1.3, ..sampling },
                _ => sampling,
            };
            if at % 2 == 1 {
                admission.choices = vec![choice(stop), choice(stop)];
            }
            if at % 4 == 2 {
                admission.end_tokens = vec![end];
            }
            rig.admit(admission)
        })
        .collect();
    let answers = keys.into_iter().map(|key| rig.answer(key)).collect();
    let is_end = |news: &JobEvent| match news {
        JobEvent::Snapshot(snapshot) => snapshot.purpose == Purpose::Finish,
        _ => false,
    };
    let jobs = ["ftjob-a", "ftjob-b"];
    rig.until(|rig| jobs.iter().all(|job| rig.news_of(job).last().is_some_and(is_end)));
    rig.until_idle();
    (answers, jobs.map(|job| rig.news_of(job).to_vec()))
}

#[test]
fn working_ahead_changes_no_answer_and_no_job() {
    let (plain, _) = answers(None, &[], 95);
    let stop = tokenizer().decode(&plain[1].tokens[0][4..6], TextStart::Continued);
    let stops: Vec<String> = vec![stop, "e".to_owned()];
    let end = plain[2].tokens[0][3];
    let (expected, expected_news) = answers(None, &stops, end);
    for polls in [0, 1, 3, 40] {
        let (found, news) = answers(Some(polls), &stops, end);
        assert_eq!(found, expected, "late by {polls}");
        assert!(news == expected_news, "late by {polls}");
    }
    let ends = |finish| expected.iter().flat_map(|a| &a.finish).filter(|f| **f == finish).count();
    assert!(ends(Some(Finish::Stop)) > 1 && ends(Some(Finish::Length)) > 1);
}
