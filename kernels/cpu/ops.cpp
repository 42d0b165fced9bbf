// CPU kernels of the specfx ops. Built once per machine by kernels/cpu_build.py; the references in Python are the specification.

#include <torch/library.h>

#include "attention.h"
#include "greedy_walk.h"
#include "keyed_sample.h"
#include "packed_linear.h"

// 1: packed_linear runs here; 0: this build or this kernel has no AMX.
extern "C" int specfx_has_packed_linear() {
#ifdef SPECFX_AMX
  return specfx::has_tiles();
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
#ifdef SPECFX_AMX
  m.impl("packed_linear", &specfx::packed_linear);
#endif
}
