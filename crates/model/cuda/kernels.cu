// All kernels of the CUDA backend, in one unit.
#include "attention.cu"
#include "bounds.cu"
#include "library.cu"
#include "linear.cu"
#include "peers.cu"
#include "rows.cu"
#include "sampler.cu"
