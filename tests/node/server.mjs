// A live server of the built binary on a free port, with its data in a folder of its own.

import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, rm } from "node:fs/promises";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";

export const ROOT = fileURLToPath(new URL("../..", import.meta.url));
const START_MS = 60_000;
const STOP_MS = 30_000;

async function freePort() {
    const probe = createServer().listen(0, "127.0.0.1");
    await once(probe, "listening");
    const { port } = probe.address();
    probe.close();
    await once(probe, "close");
    return port;
}

/** Starts a server of the demo base on the CPU; resolves to its address and a way to end it. */
export async function start() {
    const folder = await mkdtemp(join(tmpdir(), "loquetier-node-"));
    const address = `127.0.0.1:${await freePort()}`;
    const binary = process.env.LOQUETIER_BINARY ?? join(ROOT, "target/debug/loquetier");
    const options = ["--device", "cpu", "--listen", address, "--data-dir", join(folder, "data")];
    const server = spawn(binary, ["serve", ...options], { stdio: ["ignore", "ignore", "pipe"] });
    let log = "";
    server.stderr.on("data", (bytes) => (log += bytes));
    const url = `http://${address}`;
    const deadline = Date.now() + START_MS;
    for (;;) {
        if (server.exitCode !== null) throw new Error(`the server ended at once:\n${log}`);
        if (Date.now() > deadline) throw new Error(`not ready:\n${log}`);
        const ready = await fetch(`${url}/readyz`).catch(() => null);
        if (ready?.ok) break;
        await sleep(50);
    }
    const stop = async () => {
        const ended = once(server, "exit");
        server.kill("SIGTERM");
        const late = sleep(STOP_MS, "late", { ref: false });
        const code = await Promise.race([ended.then(([code]) => code), late]);
        if (code === "late") server.kill("SIGKILL");
        await rm(folder, { recursive: true, force: true });
        if (code !== 0) throw new Error(`the server ended with ${code}:\n${log}`);
    };
    return { url, stop };
}
