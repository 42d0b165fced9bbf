// CPU kernels of the specfx ops. Built once per machine by kernels/cpu_build.py; the references in Python are the specification.

#include <torch/library.h>

#include "attention.h"
#include "greedy_walk.h"
#include "keyed_sample.h"
#include "packed_linear.h"

// 1: packed_linear runs here; 0: this CPU has no instructions for products of bfloat16.
extern "C" int specfx_has_packed_linear() {
#ifdef SPECFX_DOT
  return 1;
#else
  return 0;
#endif
}

TORCH_LIBRARY_IMPL(specfx, CPU, m) {
  m.impl("tree_attention_", &specfx::tree_attention_);
  m.impl("tree_positions", &specfx::tree_positions);
  m.impl("tree_parents", &specfx::tree_parents);
  m.impl("greedy_walk", &specfx::greedy_walk);
  m.impl("keyed_sample", &specfx::keyed_sample);
#ifdef SPECFX_DOT
  m.impl("packed_linear", &specfx::packed_linear);
#endif
}
