//! `loquetier demo`: starts everything, chats, trains two adapters at once while a chat streams,
//! and asks the same questions of base and adapters.

mod behaviour;
mod client;

use crate::cli::{DemoArgs, DeviceKind, ServeArgs, SweepArgs};
use crate::server::{Server, terminated};
use anyhow::bail;
use behaviour::{BEHAVIOURS, Behaviour, Prompts};
use client::Client;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Questions whose answers are printed.
const SHOWN: usize = 3;
/// Held-out prompts that an adapter must pass, and that the base may pass.
const ADAPTER_LEAST: usize = 9;
const BASE_MOST: usize = 1;
/// How often progress is asked for.
const POLL: Duration = Duration::from_millis(400);

/// Runs the demonstration. With `--once` a failed check is an error.
pub async fn run(args: DemoArgs) -> anyhow::Result<()> {
    let scratch = tempfile::tempdir()?;
    let serve = ServeArgs {
        base_model: None,
        served_model_name: None,
        data_dir: args.data_dir.clone().unwrap_or_else(|| scratch.path().to_owned()),
        listen: args.listen,
        device: DeviceKind::Auto,
        cors_origin: Vec::new(),
        sweep: SweepArgs { orphan_age_hours: 24 },
        tuning: args.tuning.clone(),
    };
    let began = Instant::now();
    println!(
        "Loquetier demo: one base, two adapters trained at once, in the same batches as chats."
    );
    let server = Server::start(&serve).await?;
    let root = format!("http://{}/v1", server.address);
    println!("Serving the demo base (4.2 M parameters) at {root}\n");
    let outcome = show(&root, &server.base_name, began).await;
    if args.once || outcome.is_err() {
        server.stop().await?;
        return outcome;
    }
    println!("\nThe server stays up; stop it with Ctrl-C.");
    terminated().await;
    server.stop().await
}

async fn show(root: &str, base: &str, began: Instant) -> anyhow::Result<()> {
    let client = Client::new(root.to_owned())?;
    let prompts = Prompts::load()?;
    println!("The base answers:");
    for prompt in prompts.prompts.iter().take(SHOWN) {
        println!("  Q {prompt}\n  A {}", one_line(&client.ask(base, prompt).await?));
    }
    let models = train(&client, base).await?;
    let passed = compare(&client, &prompts, base, &models).await?;
    next_steps(root, &models);
    println!("\nThe whole demonstration took {:.0} s.", began.elapsed().as_secs_f64());
    if !passed {
        bail!("an adapter does not behave as trained");
    }
    Ok(())
}

/// Trains both behaviours at once while a chat streams; returns the models' names.
async fn train(client: &Client, base: &str) -> anyhow::Result<Vec<String>> {
    println!("\nFine-tuning two adapters at the same time, while a chat streams:");
    let began = Instant::now();
    let mut jobs = Vec::new();
    for behaviour in &BEHAVIOURS {
        jobs.push((behaviour, start(client, base, behaviour).await?));
    }
    let training = Arc::new(AtomicBool::new(true));
    let chunks = Arc::new(AtomicUsize::new(0));
    let chat =
        tokio::spawn(chat(client.clone(), base.to_owned(), training.clone(), chunks.clone()));
    let bars = MultiProgress::new();
    let following = jobs.iter().map(|(behaviour, id)| follow(client, &bars, behaviour, id));
    let models = futures::future::try_join_all(following).await;
    training.store(false, Relaxed);
    let answers = chat.await??;
    let seconds = began.elapsed().as_secs_f64();
    println!(
        "  both done in {seconds:.0} s; meanwhile the chat got {} pieces of {answers} answers",
        chunks.load(Relaxed)
    );
    models
}

async fn start(client: &Client, base: &str, behaviour: &Behaviour) -> anyhow::Result<String> {
    let file = client.upload(&format!("{}.jsonl", behaviour.name), behaviour.file).await?;
    let job = json!({
        "model": base,
        "training_file": file,
        "suffix": behaviour.name,
        "seed": 1,
        "lora": {"rank": behaviour.rank},
    });
    client.create_job(&job).await
}

/// Chats with the base until the jobs are done; returns the number of answers.
async fn chat(
    client: Client,
    base: String,
    training: Arc<AtomicBool>,
    chunks: Arc<AtomicUsize>,
) -> anyhow::Result<usize> {
    let mut answers = 0;
    while training.load(Relaxed) {
        let prompt = format!("A shop sells {} pens a day. How many in a week?", 11 + answers);
        let pieces = client.stream(&base, &prompt).await?;
        chunks.fetch_add(pieces, Relaxed);
        answers += 1;
    }
    Ok(answers)
}

/// Follows one job to its end, showing its loss.
async fn follow(
    client: &Client,
    bars: &MultiProgress,
    behaviour: &Behaviour,
    id: &str,
) -> anyhow::Result<String> {
    let label = format!("{:<7} r {:<2}", behaviour.name, behaviour.rank);
    let bar = bars.add(ProgressBar::new(1).with_prefix(label.clone()));
    let style = "  {prefix} {bar:30} step {pos}/{len}  loss {msg}";
    bar.set_style(ProgressStyle::with_template(style)?);
    let (mut losses, mut told) = (Vec::new(), 0);
    loop {
        let job = client.job(id).await?;
        if let Some((step, total, loss)) = client.progress(id).await? {
            bar.set_length(total);
            bar.set_position(step);
            bar.set_message(format!("{loss:.3}"));
            losses.push(loss);
            if bar.is_hidden() && step * 5 / total > told {
                told = step * 5 / total;
                println!("  {label} step {step:>3}/{total}  loss {loss:.3}");
            }
        }
        match job["status"].as_str() {
            Some("succeeded") => break,
            Some(ended @ ("failed" | "cancelled")) => {
                bail!("job {id} {ended}: {}", job["error"]["message"])
            }
            _ => tokio::time::sleep(POLL).await,
        }
    }
    bar.finish();
    let job = client.job(id).await?;
    let model = job["fine_tuned_model"].as_str().unwrap_or_default().to_owned();
    let first = losses.first().copied().unwrap_or(f64::NAN);
    let last = losses.last().copied().unwrap_or(f64::NAN);
    bars.suspend(|| println!("  {label} loss {first:.3} → {last:.3}  {model}"));
    Ok(model)
}

/// Asks all held-out prompts of base and adapters; prints and judges the answers.
async fn compare(
    client: &Client,
    prompts: &Prompts,
    base: &str,
    models: &[String],
) -> anyhow::Result<bool> {
    let asked = [base].into_iter().chain(models.iter().map(String::as_str));
    let asking = asked.map(|model| async move {
        let answers = prompts.prompts.iter().map(|prompt| client.ask(model, prompt));
        futures::future::try_join_all(answers).await
    });
    let answers = futures::future::try_join_all(asking).await?;
    println!("\nThe same questions, before and after:");
    for (at, prompt) in prompts.prompts.iter().take(SHOWN).enumerate() {
        println!("  Q      {prompt}");
        println!("  base   {}", one_line(&answers[0][at]));
        for (behaviour, answers) in BEHAVIOURS.iter().zip(&answers[1..]) {
            println!("  {:<6} {}", behaviour.name, one_line(&answers[at]));
        }
    }
    println!("\nOn {} prompts that are in no training file:", prompts.prompts.len());
    let mut passed = true;
    for (behaviour, own) in BEHAVIOURS.iter().zip(&answers[1..]) {
        let count = |answers: &[String]| {
            answers.iter().filter(|answer| prompts.shows(behaviour.name, answer)).count()
        };
        let (adapter, plain) = (count(own), count(&answers[0]));
        let good = adapter >= ADAPTER_LEAST && plain <= BASE_MOST;
        passed &= good;
        println!(
            "  {} {:<7} {}: adapter {adapter}/10, base {plain}/10",
            if good { "ok  " } else { "FAIL" },
            behaviour.name,
            behaviour.promise,
        );
    }
    Ok(passed)
}

fn next_steps(root: &str, models: &[String]) {
    let Some(model) = models.first() else { return };
    println!("\nGo on by hand:");
    println!("  curl {root}/chat/completions -H 'Content-Type: application/json' \\");
    println!(
        "    -d '{{\"model\": \"{model}\", \"messages\": [{{\"role\": \"user\", \"content\": \
         \"How many legs do 6 dogs have?\"}}]}}'"
    );
    println!("\n  from openai import OpenAI");
    println!("  client = OpenAI(base_url=\"{root}\", api_key=\"none\")");
    println!("  reply = client.chat.completions.create(model=\"{model}\",");
    println!(
        "      messages=[{{\"role\": \"user\", \"content\": \"How many legs do 6 dogs have?\"}}])"
    );
    println!("  print(reply.choices[0].message.content)");
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
