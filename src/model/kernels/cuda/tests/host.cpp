// The kernels as functions of a library, for the tests in mod.rs. The arguments of the launch come first.

#include "../kernels.cu"

extern "C" {
void host_embed(unsigned tokens, unsigned block, float *out, const unsigned *ids, const unsigned *positions,
                const unsigned *types, const float *word, const float *position, const float *type, const float *weight,
                const float *bias, float eps, int width) {
  host::run({tokens, 1, 1}, block,
            [=] { embed_f32(out, ids, positions, types, word, position, type, weight, bias, eps, width); });
}

void host_add_norm(unsigned tokens, unsigned block, float *out, const float *x, const float *added, const float *residual,
                   const float *weight, const float *bias, float eps, int width) {
  host::run({tokens, 1, 1}, block, [=] { add_norm_f32(out, x, added, residual, weight, bias, eps, width); });
}

void host_add_activate(unsigned tokens, unsigned block, float *out, const float *x, const float *added, int activation,
                       int width) {
  host::run({tokens, 1, 1}, block, [=] { add_activate_f32(out, x, added, activation, width); });
}

void host_gated(unsigned tokens, unsigned block, float *out, const float *x, const float *added, int activation, int gate,
                int width) {
  host::run({tokens, 1, 1}, block, [=] { gated_f32(out, x, added, activation, gate, width); });
}

void host_pool(unsigned sequences, unsigned block, float *out, const float *x, const unsigned *starts, int pooling,
               int width) {
  host::run({sequences, 1, 1}, block, [=] { pool_f32(out, x, starts, pooling, width); });
}

void host_rotate(unsigned tokens, unsigned block, float *qkv, const float *bias, const unsigned *positions,
                 const float *cosines, const float *sines, int heads, int width) {
  host::run({tokens, 1, 1}, block, [=] { rotate_f32(qkv, bias, positions, cosines, sines, heads, width); });
}

// Maximum threads that the attention kernels are compiled for: a launch with more fails.
unsigned host_attention_threads(bool is_short) { return is_short ? SHORT_ATTENTION_THREADS : ATTENTION_THREADS; }

// `most` blocks of `block` threads for each sequence.
void host_attend(unsigned most, unsigned block, unsigned sequences, float *out, const float *qkv, const float *query_bias,
                 const float *value_bias, const unsigned *starts, const float *distances, int heads, int width, int before, int after, int span) {
  host::run({sequences * most, unsigned(heads), 1}, block, [=] {
    auto kernel = width == 32 ? attend_32_f32 : attend_64_f32;
    kernel(out, qkv, query_bias, value_bias, starts, distances, most, heads, before, after, span);
  });
}

void host_attend_bf16(unsigned most, unsigned block, bool is_short, unsigned sequences, __nv_bfloat16 *out,
                      const __nv_bfloat16 *qkv, const __nv_bfloat16 *query_bias, const __nv_bfloat16 *value_bias,
                      const unsigned *starts, const float *distances, int heads, int width, int before, int after, int span) {
  host::run({sequences * most, unsigned(heads), 1}, block, [=] {
    auto kernel = width == 32 ? (is_short ? attend_short_32_bf16 : attend_32_bf16)
                              : (is_short ? attend_short_64_bf16 : attend_64_bf16);
    kernel(out, qkv, query_bias, value_bias, starts, distances, most, heads, before, after, span);
  });
}

void host_add_activate_bf16(unsigned tokens, unsigned block, __nv_bfloat16 *out, const __nv_bfloat16 *x,
                            const __nv_bfloat16 *added, int activation, int width) {
  host::run({tokens, 1, 1}, block, [=] { add_activate_bf16(out, x, added, activation, width); });
}

// An operation on rows of 16-bit elements, whose pieces have more elements.
void host_add_norm_bf16(unsigned tokens, unsigned block, __nv_bfloat16 *out, const __nv_bfloat16 *x,
                        const __nv_bfloat16 *added, const __nv_bfloat16 *residual, const __nv_bfloat16 *weight,
                        const __nv_bfloat16 *bias, float eps, int width) {
  host::run({tokens, 1, 1}, block, [=] { add_norm_bf16(out, x, added, residual, weight, bias, eps, width); });
}
}
