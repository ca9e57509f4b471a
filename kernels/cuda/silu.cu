// SwiGLU (Shazeer 2020), forward beside backward. `gate_up (N, 2F)` holds gate, then up. A thread
// takes eight columns of one row: grid (N, ceil(F / 2048)) of 256 threads.

/// `1 / (1 + exp(−x))`; 0 and 1 at far ends, never NaN for a number.
__device__ __forceinline__ float sigmoid(float x) {
    return __fdividef(1.0f, 1.0f + fminf(__expf(-x), 0x1p125f));
}
__device__ __forceinline__ void load_eight(float (&to)[8], const bf16* row, int at, int width,
                                           bool vector) {
    if (vector) {
        unpack(to, *(const Eight*)(row + at));
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = at + i < width ? to_float(row[at + i]) : 0.0f;
}
__device__ __forceinline__ void store_eight(bf16* row, const float (&from)[8], int at, int width,
                                            bool vector) {
    if (vector) {
        *(Eight*)(row + at) = pack(from);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (at + i < width) row[at + i] = to_bf16(from[i]);
}

/// `y = silu(gate) · up`.
extern "C" __global__ void __launch_bounds__(256)
    silu_mul(bf16* y, const bf16* gate_up, int ffn) {
    int at = ((int)blockIdx.y * 256 + (int)threadIdx.x) * 8;
    if (at >= ffn) return;
    bool vector = ffn % 8 == 0 && aligned16(y) && aligned16(gate_up);
    long long row = blockIdx.x;
    const bf16* input = gate_up + row * 2 * ffn;
    float gate[8], up[8];
    load_eight(gate, input, at, ffn, vector);
    load_eight(up, input + ffn, at, ffn, vector);
#pragma unroll
    for (int i = 0; i < 8; ++i) up[i] *= gate[i] * sigmoid(gate[i]);
    store_eight(y + row * ffn, up, at, ffn, vector);
}

/// `d_gate_up` from `dy`.
extern "C" __global__ void __launch_bounds__(256)
    silu_mul_backward(bf16* d_gate_up, const bf16* dy, const bf16* gate_up, int ffn) {
    int at = ((int)blockIdx.y * 256 + (int)threadIdx.x) * 8;
    if (at >= ffn) return;
    bool vector = ffn % 8 == 0 && aligned16(d_gate_up) && aligned16(dy) && aligned16(gate_up);
    long long row = blockIdx.x;
    const bf16* input = gate_up + row * 2 * ffn;
    float gate[8], up[8], d[8];
    load_eight(gate, input, at, ffn, vector);
    load_eight(up, input + ffn, at, ffn, vector);
    load_eight(d, dy + row * ffn, at, ffn, vector);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float part = sigmoid(gate[i]), g = gate[i];
        gate[i] = d[i] * up[i] * part * (1.0f + g * (1.0f - part));
        up[i] = d[i] * g * part;
    }
    bf16* output = d_gate_up + row * 2 * ffn;
    store_eight(output, gate, at, ffn, vector);
    store_eight(output + ffn, up, at, ffn, vector);
}
