// Many runs from one allocation of a device into another, in one launch. Everything counts in units of 16 bytes.
//
// The runs travel in the launch itself: no memory has to live until it ends. `device.ptx` is made of this file:
//     nvcc -O3 -std=c++17 -arch=compute_75 -ptx device.cu, and its head then says .version 7.0 and .target sm_70
//
// blockIdx.y: the run; blockIdx.x: which part of it.

struct Run {
    unsigned source, target, size;
};

struct Launch {
    uint4 *source, *target;
    Run runs[336];
};

extern "C" __global__ void __launch_bounds__(256) baton_copy_runs(const __grid_constant__ Launch launch) {
    const Run run = launch.runs[blockIdx.y];
    const uint4 *from = launch.source + run.source;
    uint4 *to = launch.target + run.target;
    const unsigned step = gridDim.x * blockDim.x;
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 3 * step < run.size; i += 4 * step) {  // four loads on their way at once
        const uint4 a = __ldcg(from + i), b = __ldcg(from + i + step), c = __ldcg(from + i + 2 * step), d = __ldcg(from + i + 3 * step);
        __stcg(to + i, a);
        __stcg(to + i + step, b);
        __stcg(to + i + 2 * step, c);
        __stcg(to + i + 3 * step, d);
    }
    for (; i < run.size; i += step)
        __stcg(to + i, __ldcg(from + i));
}
