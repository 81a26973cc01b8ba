// The kernels as functions of a library, for the tests in mod.rs. The arguments of the launch come first.

#include "../kernels.cu"

extern "C" {
void host_embed(unsigned tokens, unsigned block, float *out, const unsigned *ids, const unsigned *positions,
                const unsigned *types, const float *word, const float *position, const float *type, const float *weight,
                const float *bias, float scale, float eps, int width) {
  host::run({tokens, 1, 1}, block,
            [=] { embed_f32(out, ids, positions, types, word, position, type, weight, bias, scale, eps, width); });
}

void host_add_norm(unsigned tokens, unsigned block, float *out, const float *x, const float *added, const float *residual,
                   const float *weight, const float *bias, float eps, int width) {
  host::run({tokens, 1, 1}, block, [=] { add_norm_f32(out, x, added, residual, weight, bias, eps, width); });
}

void host_rms_norm(unsigned tokens, unsigned block, float *out, const float *x, const float *added, const float *residual,
                   const float *weight, float eps, int after, int width) {
  host::run({tokens, 1, 1}, block, [=] { rms_norm_f32(out, x, added, residual, weight, eps, after, width); });
}

void host_add_activate(unsigned tokens, unsigned block, float *out, const float *x, const float *added, int activation,
                       int width) {
  host::run({tokens, 1, 1}, block, [=] { add_activate_f32(out, x, added, activation, width); });
}

void host_gated(unsigned tokens, unsigned block, float *out, const float *x, const float *added, int activation, int gate,
                int width) {
  host::run({tokens, 1, 1}, block, [=] { gated_f32(out, x, added, activation, gate, width); });
}

void host_pool(unsigned sequences, unsigned block, float *out, const float *x, const unsigned *starts,
               const unsigned *skipped, int pooling, int width) {
  host::run({sequences, 1, 1}, block, [=] { pool_f32(out, x, starts, skipped, pooling, width); });
}

void host_reduce(unsigned blocks, unsigned sequences, unsigned block, float *out, const float *logits,
                 const unsigned *starts, int first, int count, int place, int kind, int width) {
  host::run({blocks, sequences, 1}, block, [=] { reduce_f32(out, logits, starts, first, count, place, kind, width); });
}

void host_rotate(unsigned tokens, unsigned block, float *rows, const float *bias, const unsigned *positions,
                 const float *cosines, const float *sines, int heads, int stride, int width) {
  host::run({tokens, 1, 1}, block, [=] { rotate_f32(rows, bias, positions, cosines, sines, heads, stride, width); });
}

void host_norm_heads(unsigned tokens, unsigned block, float *rows, const float *bias, const float *of_queries,
                     const float *of_keys, const unsigned *positions, const float *cosines, const float *sines,
                     int queries, int heads, int stride, float eps, int width) {
  host::run({tokens, 1, 1}, block, [=] {
    norm_heads_f32(rows, bias, of_queries, of_keys, positions, cosines, sines, queries, heads, stride, eps, width);
  });
}

// Maximum threads that the attention kernels are compiled for: a launch with more fails.
unsigned host_attention_threads(int width, bool bits16, bool is_short) {
  if (bits16) return is_short ? SHORT_ATTENTION_THREADS : ATTENTION_THREADS;
  return width == 256 ? MOST_THREADS<float, 256, 0> : width == 128 ? MOST_THREADS<float, 128, 0> : MOST_THREADS<float, 64, 0>;
}

// `most` blocks of `block` threads for each sequence.
void host_attend(unsigned most, unsigned block, unsigned sequences, float *out, const float *qkv, const float *query_bias,
                 const float *value_bias, const unsigned *starts, const float *distances, int heads, int groups, int width,
                 int before, int after, int span, float scale) {
  host::run({sequences * most, unsigned(heads), 1}, block, [=] {
    auto kernel = width == 32 ? attend_32_f32 : width == 64 ? attend_64_f32 : width == 128 ? attend_128_f32 : attend_256_f32;
    kernel(out, qkv, query_bias, value_bias, starts, distances, most, heads, groups, before, after, span, scale);
  });
}

void host_attend_bf16(unsigned most, unsigned block, bool is_short, unsigned sequences, __nv_bfloat16 *out,
                      const __nv_bfloat16 *qkv, const __nv_bfloat16 *query_bias, const __nv_bfloat16 *value_bias,
                      const unsigned *starts, const float *distances, int heads, int groups, int width, int before,
                      int after, int span, float scale) {
  host::run({sequences * most, unsigned(heads), 1}, block, [=] {
    auto kernel = width == 32   ? (is_short ? attend_short_32_bf16 : attend_32_bf16)
                  : width == 64 ? (is_short ? attend_short_64_bf16 : attend_64_bf16)
                  : width == 128 ? attend_128_bf16
                                 : attend_256_bf16;
    kernel(out, qkv, query_bias, value_bias, starts, distances, most, heads, groups, before, after, span, scale);
  });
}

void host_attend_apart(unsigned most, unsigned block, unsigned sequences, float *out, const float *qkv,
                       const unsigned *starts, const float *position_keys, const float *position_queries,
                       const unsigned *rows, int heads, int width, int before, int after, int longest, int span,
                       float scale) {
  host::run({sequences * most, unsigned(heads), 1}, block, [=] {
    auto kernel = width == 32 ? attend_apart_32_f32 : attend_apart_64_f32;
    kernel(out, qkv, starts, position_keys, position_queries, rows, most, heads, before, after, longest, span, scale);
  });
}

void host_attend_apart_bf16(unsigned most, unsigned block, unsigned sequences, __nv_bfloat16 *out,
                            const __nv_bfloat16 *qkv, const unsigned *starts, const __nv_bfloat16 *position_keys,
                            const __nv_bfloat16 *position_queries, const unsigned *rows, int heads, int width, int before,
                            int after, int longest, int span, float scale) {
  host::run({sequences * most, unsigned(heads), 1}, block, [=] {
    auto kernel = width == 32 ? attend_apart_32_bf16 : attend_apart_64_bf16;
    kernel(out, qkv, starts, position_keys, position_queries, rows, most, heads, before, after, longest, span, scale);
  });
}

void host_add_activate_bf16(unsigned tokens, unsigned block, __nv_bfloat16 *out, const __nv_bfloat16 *x,
                            const __nv_bfloat16 *added, int activation, int width) {
  host::run({tokens, 1, 1}, block, [=] { add_activate_bf16(out, x, added, activation, width); });
}

// Operations on rows of 16-bit elements, whose pieces have more elements.
void host_add_norm_bf16(unsigned tokens, unsigned block, __nv_bfloat16 *out, const __nv_bfloat16 *x,
                        const __nv_bfloat16 *added, const __nv_bfloat16 *residual, const __nv_bfloat16 *weight,
                        const __nv_bfloat16 *bias, float eps, int width) {
  host::run({tokens, 1, 1}, block, [=] { add_norm_bf16(out, x, added, residual, weight, bias, eps, width); });
}

void host_rms_norm_bf16(unsigned tokens, unsigned block, __nv_bfloat16 *out, const __nv_bfloat16 *x,
                        const __nv_bfloat16 *added, const __nv_bfloat16 *residual, const float *weight, float eps,
                        int after, int width) {
  host::run({tokens, 1, 1}, block, [=] { rms_norm_bf16(out, x, added, residual, weight, eps, after, width); });
}

void host_reduce_bf16(unsigned blocks, unsigned sequences, unsigned block, float *out, const __nv_bfloat16 *logits,
                      const unsigned *starts, int first, int count, int place, int kind, int width) {
  host::run({blocks, sequences, 1}, block, [=] { reduce_bf16(out, logits, starts, first, count, place, kind, width); });
}
}
