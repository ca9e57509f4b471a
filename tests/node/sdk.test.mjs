// The way of a first user with the official Node SDK: upload, fine-tune, look on, chat, clean up.

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";

import OpenAI, { toFile } from "openai";

import { ROOT, start } from "./server.mjs";

const JOB_MS = 180_000;
const QUESTION = [{ role: "user", content: "A shelf holds 6 rows of 9 books. How many?" }];

let server;
let client;
let job;

before(async () => {
    server = await start();
    // No retries: a reply that makes the SDK try again is a fault here.
    const options = { baseURL: `${server.url}/v1`, apiKey: "unused", maxRetries: 0 };
    client = new OpenAI(options);
    const data = await readFile(join(ROOT, "demo/data/pirate.jsonl"), "utf8");
    const lines = data.split("\n").slice(0, 48).join("\n");
    const file = await client.files.create({
        file: await toFile(Buffer.from(lines), "train.jsonl"),
        purpose: "fine-tune",
    });
    assert.equal(file.bytes, Buffer.byteLength(lines));
    job = await client.fineTuning.jobs.create({
        model: "demo",
        training_file: file.id,
        suffix: "node",
        seed: 7,
        method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 5 } } },
        lora: { rank: 4 },
    });
    const deadline = Date.now() + JOB_MS;
    while (job.status !== "succeeded") {
        assert.ok(!["failed", "cancelled"].includes(job.status), JSON.stringify(job.error));
        assert.ok(Date.now() < deadline, `${job.id} is ${job.status}`);
        await sleep(100);
        job = await client.fineTuning.jobs.retrieve(job.id);
    }
});

after(() => server?.stop());

test("the job names its model and tells its story", async () => {
    assert.match(job.fine_tuned_model, /^ft:demo:[^:]+:node:[A-Za-z0-9]{8}$/);
    const messages = [];
    for await (const event of client.fineTuning.jobs.listEvents(job.id, { limit: 7 })) {
        messages.push(event.message);
    }
    assert.equal(messages.at(-1), `Created fine-tuning job: ${job.id}`);
    assert.equal(messages[0], "The job has successfully completed");
    const page = await client.fineTuning.jobs.checkpoints.list(job.id);
    assert.equal(page.data[0].fine_tuned_model_checkpoint, job.fine_tuned_model);
    assert.equal(page.data.length, 5);
});

test("models are listed", async () => {
    const names = [];
    for await (const model of client.models.list()) names.push(model.id);
    assert.ok(names.includes("demo") && names.includes(job.fine_tuned_model), names.join());
});

test("a stream says the same as a plain reply, in the trained voice", async () => {
    const request = { model: job.fine_tuned_model, messages: QUESTION, temperature: 0 };
    const plain = await client.chat.completions.create({ ...request, max_completion_tokens: 16 });
    let text = "";
    let usage;
    const stream = await client.chat.completions.create({
        ...request,
        max_completion_tokens: 16,
        stream: true,
        stream_options: { include_usage: true },
    });
    for await (const chunk of stream) {
        text += chunk.choices[0]?.delta?.content ?? "";
        usage = chunk.usage ?? usage;
    }
    assert.equal(text, plain.choices[0].message.content);
    assert.deepEqual(usage, plain.usage);
    const base = await client.chat.completions.create({
        ...request,
        model: "demo",
        max_completion_tokens: 16,
    });
    assert.notEqual(base.choices[0].message.content, text);
});

test("a stream that is left ends on the server", async () => {
    const stream = await client.chat.completions.create({
        model: "demo",
        messages: QUESTION,
        max_completion_tokens: 400,
        ignore_eos: true,
        stream: true,
    });
    for await (const _ of stream) break;
    const deadline = Date.now() + 5_000;
    for (;;) {
        const reply = await fetch(`${server.url}/v1/workers`);
        const { data } = await reply.json();
        if (data.every((worker) => worker.requests === 0)) return;
        assert.ok(Date.now() < deadline, JSON.stringify(data));
        await sleep(50);
    }
});

test("errors are the SDK's own, and name the field", async () => {
    await assert.rejects(
        client.chat.completions.create({ model: "ft:demo:none::x", messages: QUESTION }),
        (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found",
    );
    await assert.rejects(
        client.chat.completions.create({ model: "demo", messages: QUESTION, temperature: 9 }),
        (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature",
    );
});

test("a deleted model is gone", async () => {
    const name = job.fine_tuned_model;
    const deleted = await client.models.delete(name);
    assert.ok(deleted.deleted);
    await assert.rejects(client.models.retrieve(name), OpenAI.NotFoundError);
});
