//! Every golden base against transformers, and chunked prefill and decode against whole prefill.

use crate::common::reading::read;
use crate::common::{BASES, Expected, bits, largest_difference, model, sizes};

#[test]
fn logits_are_those_of_transformers() {
    for base in BASES {
        let expected = Expected::open(&format!("bases/{base}/expected.safetensors"));
        let mut model = model::<f32>(base, 1, sizes());
        let found = read(&mut model, &expected.ints("ids"), None, &[]);
        let difference = largest_difference(&found, &expected.floats("logits"));
        assert!(difference <= 1e-4, "{base}: {difference}");
    }
}

#[test]
fn chunks_and_single_tokens_give_the_bits_of_a_whole_prefill() {
    for base in BASES {
        let ids = Expected::open(&format!("bases/{base}/expected.safetensors")).ints("ids");
        for threads in [1, 2] {
            let mut model = model::<f32>(base, threads, sizes());
            let whole = bits(&read(&mut model, &ids, None, &[]));
            for cuts in [vec![1, 47], vec![17, 16, 15], vec![5; 10], vec![31, 1, 1], vec![1; 48]] {
                let cut = bits(&read(&mut model, &ids, None, &cuts));
                assert!(cut == whole, "{base}, {threads} threads, chunks {cuts:?}");
            }
        }
    }
}
