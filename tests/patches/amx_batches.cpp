// A matrix times a batch of matrices, by the kernels for CPUs with AMX. Prints the largest error of each type, relative to the
// largest value. Only kernels that need no AMX unit are run: F16, and Q8_0 with one row.

#include "amx/mmq.h"
#include "ggml.h"
#include "ggml-cpu.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

static double largest_error(ggml_type type, int64_t rows) {
    const int64_t K = 64, N = 64, batch = 3;

    ggml_init_params params = { 16*1024*1024, nullptr, false };
    ggml_context * ctx = ggml_init(params);

    std::vector<float> weights(N*K);
    for (float & w : weights) { w = rand() / (float) RAND_MAX - 0.5f; }

    std::vector<char> quantized(ggml_row_size(type, K)*N);
    ggml_quantize_chunk(type, weights.data(), quantized.data(), 0, N, K, nullptr);

    ggml_tensor * src0 = ggml_new_tensor_2d(ctx, type, K, N);
    if (type == GGML_TYPE_F16) {
        memcpy(src0->data, quantized.data(), quantized.size());
    } else {
        src0->data = malloc(ggml_backend_amx_get_alloc_size(src0));
        ggml_backend_amx_convert_weight(src0, quantized.data(), 0, quantized.size());
    }
    ggml_get_type_traits(type)->to_float(quantized.data(), weights.data(), N*K);

    ggml_tensor * src1 = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, K, rows, batch);
    for (int64_t i = 0; i < ggml_nelements(src1); i++) {
        ((float *) src1->data)[i] = rand() / (float) RAND_MAX - 0.5f;
    }

    ggml_tensor * dst = ggml_mul_mat(ctx, src0, src1);

    std::vector<char> work(1 + ggml_backend_amx_desired_wsize(dst));
    ggml_threadpool_params pool_params = ggml_threadpool_params_default(1);
    ggml_threadpool * pool = ggml_threadpool_new(&pool_params);
    ggml_compute_params compute = { 0, 1, work.size(), work.data(), pool, false };
    ggml_backend_amx_mul_mat(&compute, dst);
    ggml_threadpool_free(pool);

    double error = 0.0, largest = 0.0;
    for (int64_t row = 0; row < rows*batch; row++) {
        for (int64_t n = 0; n < N; n++) {
            double sum = 0.0;
            for (int64_t k = 0; k < K; k++) {
                sum += (double) weights[n*K + k] * ((float *) src1->data)[row*K + k];
            }
            const double is = ((float *) dst->data)[row*N + n];
            error   = std::isfinite(is) ? std::max(error, std::fabs(is - sum)) : INFINITY;
            largest = std::max(largest, std::fabs(sum));
        }
    }
    ggml_free(ctx);
    return error / largest;
}

int main() {
    ggml_cpu_init();
    printf("F16 %g\n",  largest_error(GGML_TYPE_F16,  5));
    printf("Q8_0 %g\n", largest_error(GGML_TYPE_Q8_0, 1));
}
