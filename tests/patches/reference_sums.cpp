// Sums of squares in double precision of what llama-imatrix collects: the same batches, every activation copied to the host.
//
//     reference-sums MODEL TEXT CONTEXT CHUNKS OUT
//
// OUT: for each matrix a line `name matrices columns`, then the sums as doubles.

#include "ggml-backend.h"
#include "llama.h"

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

struct sums {
    int64_t n_mat = 0;
    std::vector<double> values;
};

static std::map<std::string, sums> collected;

static bool collect(ggml_tensor * t, bool ask, void *) {
    const bool by_expert = t->op == GGML_OP_MUL_MAT_ID;
    if (!by_expert && t->op != GGML_OP_MUL_MAT) {
        return !ask;
    }
    const ggml_tensor * x = t->src[1];
    if (std::strncmp(t->src[0]->name, "blk.", 4) != 0 || (!by_expert && (x->ne[1] < 16 || x->type != GGML_TYPE_F32))) {
        return !ask;
    }
    if (ask) {
        return true;
    }
    std::vector<char> data(ggml_nbytes(x)), ids;
    ggml_backend_tensor_get(x, data.data(), 0, data.size());
    auto & s = collected[t->src[0]->name];
    s.n_mat = t->src[0]->ne[2];
    s.values.resize(s.n_mat * x->ne[0]);
    const auto add = [&](int64_t mat, int64_t i1, int64_t i2) {
        const float * row = (const float *) (data.data() + i1 * x->nb[1] + i2 * x->nb[2]);
        for (int64_t j = 0; j < x->ne[0]; ++j) {
            s.values[mat * x->ne[0] + j] += (double) row[j] * row[j];
        }
    };
    if (by_expert) {
        const ggml_tensor * experts = t->src[2];
        ids.resize(ggml_nbytes(experts));
        ggml_backend_tensor_get(experts, ids.data(), 0, ids.size());
        for (int64_t token = 0; token < experts->ne[1]; ++token) {
            for (int64_t i = 0; i < experts->ne[0]; ++i) {
                add(*(const int32_t *) (ids.data() + token * experts->nb[1] + i * experts->nb[0]), i % x->ne[1], token);
            }
        }
    } else {
        for (int64_t i2 = 0; i2 < x->ne[2]; ++i2) {
            for (int64_t i1 = 0; i1 < x->ne[1]; ++i1) {
                add(i2 % s.n_mat, i1, i2);
            }
        }
    }
    return true;
}

int main(int, char ** argv) {
    std::ifstream file(argv[2]);
    const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    const int n_ctx = std::atoi(argv[3]), n_chunk = std::atoi(argv[4]);

    llama_backend_init();
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = n_ctx;
    params.n_ubatch = 512;
    params.n_threads = params.n_threads_batch = 1;
    params.cb_eval = collect;
    llama_context * ctx = llama_init_from_model(model, params);
    const llama_vocab * vocab = llama_model_get_vocab(model);
    std::vector<llama_token> tokens(text.size() + 8);
    tokens.resize(llama_tokenize(vocab, text.c_str(), text.size(), tokens.data(), tokens.size(), true, false));

    llama_batch batch = llama_batch_init(n_ctx, 0, 1);
    for (int chunk = 0; chunk < n_chunk; ++chunk) {
        llama_memory_clear(llama_get_memory(ctx), true);
        batch.n_tokens = n_ctx;
        for (int i = 0; i < n_ctx; ++i) {
            batch.token[i] = tokens[chunk * n_ctx + i];
            batch.pos[i] = i;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = true;
        }
        if (llama_vocab_get_add_bos(vocab)) {
            batch.token[0] = llama_vocab_bos(vocab);
        }
        if (llama_decode(ctx, batch) != 0) {
            return 1;
        }
    }

    std::ofstream out(argv[5], std::ios::binary);
    for (const auto & [name, s] : collected) {
        out << name << ' ' << s.n_mat << ' ' << s.values.size() / s.n_mat << '\n';
        out.write((const char *) s.values.data(), s.values.size() * sizeof(double));
    }
    return out.good() ? 0 : 1;
}
