/* SentencePiece behind tokenizer.h.
 *
 * What its C++ library would lose is kept here.  Decoding is done from the pieces' own texts.  A real U+2581 (the sign
 * that SentencePiece puts in place of a space) and bytes that are not UTF-8 become byte pieces before it sees them.
 */
#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>
#include <zlib.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <unordered_map>
#include <vector>

#define _Noreturn [[noreturn]] /* C's word, in the headers below */
extern "C" {
#include "core/base/file.h"
#include "core/base/rng.h"
}
#include "core/data/text.h"
#include "core/data/tokenizer.h"

namespace
{
const char kSpace[] = "\xe2\x96\x81";   /* U+2581 */
const char kUnknown[] = " \xe2\x81\x87 "; /* what SentencePiece shows for an unknown piece: U+2047 between spaces */

/* Runs f; whatever C++ throws becomes a status. */
template <typename F> sel_status guarded(const char *what, F f)
{
    try {
        return f();
    } catch (const std::bad_alloc &) {
        return sel_fail(SEL_ENOMEM, "%s: out of memory", what);
    } catch (const std::exception &e) {
        return sel_fail(SEL_EFILE, "%s: %s", what, e.what());
    }
}

/* One line out of a SentencePiece message. */
std::string one_line(const sentencepiece::util::Status &s)
{
    std::string line = s.error_message();
    std::replace(line.begin(), line.end(), '\n', ' ');
    return line;
}

/* --- the .model's settings: a few fields of a protocol buffer whose C++ classes are not installed ---------- */

struct Settings {
    bool trainer = false, normalizer = false; /* the two parts are there */
    bool dummy_prefix = true;                 /* a space is put before the text */
    bool squeeze = true;                      /* white space at the ends and runs of it are lost */
    bool suffix = false;                      /* white space ends a piece instead of beginning it */
};

/* Walks a message's fields, field(number, value of a varint, bytes of a block); false if it is malformed. */
template <typename F> bool walk(const char *p, const char *end, F field)
{
    auto varint = [&](uint64_t *value) {
        *value = 0;
        for (int shift = 0; p < end && shift < 64; shift += 7) {
            const unsigned char c = static_cast<unsigned char>(*p++);
            *value |= static_cast<uint64_t>(c & 0x7f) << shift;
            if (c < 0x80) return true;
        }
        return false;
    };
    while (p < end) {
        uint64_t key, value = 0;
        const char *block = nullptr;
        if (!varint(&key)) return false;
        switch (key & 7) {
        case 0:
            if (!varint(&value)) return false;
            break;
        case 1:
        case 5: {
            const ptrdiff_t fixed = (key & 7) == 1 ? 8 : 4;
            if (end - p < fixed) return false;
            p += fixed;
            break;
        }
        case 2:
            if (!varint(&value) || value > static_cast<uint64_t>(end - p)) return false;
            block = p;
            p += value;
            break;
        default: return false;
        }
        if (!field(key >> 3, value, block)) return false;
    }
    return true;
}

bool read_settings(const std::string &model, Settings *s)
{
    auto normalizer = [s](uint64_t number, uint64_t value, const char *) {
        if (number == 3) s->dummy_prefix = value != 0;
        if (number == 4) s->squeeze = value != 0;
        return true;
    };
    auto trainer = [s](uint64_t number, uint64_t value, const char *) {
        if (number == 24) s->suffix = value != 0;
        return true;
    };
    return walk(model.data(), model.data() + model.size(), [&](uint64_t number, uint64_t value, const char *block) {
        if (number == 2 && block) s->trainer = true;
        if (number == 3 && block) s->normalizer = true;
        if (number == 2 && block) return walk(block, block + value, trainer);
        if (number == 3 && block) return walk(block, block + value, normalizer);
        return true;
    });
}

/* The same model with another dummy prefix: of two values of one field the later holds, and the parts of a
   message that comes twice are merged, so it is enough to append normalizer_spec { add_dummy_prefix }. */
std::string with_dummy_prefix(const std::string &model, bool on)
{
    return model + std::string("\x1a\x02\x18", 3) + (on ? '\x01' : '\x00');
}
} // namespace

struct sel_tokenizer {
    std::string path, model;
    Settings settings;
    uint32_t crc;
    int32_t bos, eos;
    bool exact;             /* it has byte pieces and loses no white space: any bytes can be kept */
    int32_t byte_piece[256]; /* if exact */
    std::vector<std::string> text;    /* of each piece */
    std::vector<bool> leads_with_space; /* a normal piece that begins with one */

    /* Encoders of a text's first part and of what follows another part. */
    sentencepiece::SentencePieceProcessor first, later;
    const sentencepiece::SentencePieceProcessor *encoder[2];
};

namespace
{
/* What each piece decodes to. */
void list_pieces(sel_tokenizer *t)
{
    const int n = t->first.GetPieceSize();
    int n_bytes = 0;

    t->text.resize(static_cast<size_t>(n));
    t->leads_with_space.resize(static_cast<size_t>(n));
    for (int id = 0; id < n; id++) {
        std::string &text = t->text[static_cast<size_t>(id)];
        const std::string &piece = t->first.IdToPiece(id);
        unsigned byte;
        if (t->first.IsControl(id)) continue;
        if (t->first.IsUnknown(id)) {
            text = kUnknown;
        } else if (t->first.IsByte(id) && sscanf(piece.c_str(), "<0x%2X>", &byte) == 1) {
            text.assign(1, static_cast<char>(byte));
            t->byte_piece[byte] = id;
            n_bytes++;
        } else {
            t->leads_with_space[static_cast<size_t>(id)] = piece.compare(0, 3, kSpace) == 0;
            text = piece;
            for (size_t at = 0; (at = text.find(kSpace, at)) != std::string::npos; at++) text.replace(at, 3, " ");
        }
    }
    t->exact = n_bytes == 256 && !t->settings.squeeze;
}

sel_status load(sel_tokenizer *t, const char *path)
{
    char *data = nullptr;
    size_t bytes = 0;
    SEL_TRY(sel_read_file(path, &data, &bytes));
    const std::unique_ptr<char, decltype(&free)> owner(data, free);

    t->path = path;
    t->model.assign(data, bytes);
    t->crc = static_cast<uint32_t>(crc32_z(0, reinterpret_cast<const unsigned char *>(data), bytes));
    if (!read_settings(t->model, &t->settings) || !t->settings.trainer || !t->settings.normalizer)
        return sel_fail(SEL_EFILE, "%s: is not a SentencePiece model, or it is cut off", path);
    if (t->settings.suffix)
        return sel_fail(SEL_EUSER, "%s: white space at the end of pieces (treat_whitespace_as_suffix) is not supported",
                        path);

    sentencepiece::util::Status s = t->first.LoadFromSerializedProto(t->model);
    if (!s.ok()) return sel_fail(SEL_EFILE, "%s: is not a SentencePiece model: %s", path, one_line(s).c_str());

    /* Inside a text nothing is put before a part; only a model that squeezes white space would lose the space at which
       the text was cut, and gets it back as the prefix. */
    t->encoder[0] = t->encoder[1] = &t->first;
    if (t->settings.dummy_prefix != t->settings.squeeze) {
        s = t->later.LoadFromSerializedProto(with_dummy_prefix(t->model, t->settings.squeeze));
        if (!s.ok()) return sel_fail(SEL_EFILE, "%s: %s", path, one_line(s).c_str());
        t->encoder[0] = &t->later;
    }
    t->bos = t->first.bos_id();
    t->eos = t->first.eos_id();
    list_pieces(t);
    return SEL_OK;
}

/* Room for `more` ids. */
sel_status grow(int32_t **ids, size_t n, size_t more, size_t *capacity)
{
    if (n + more <= *capacity) return SEL_OK;

    const size_t grown = std::max(n + more, *capacity * 2);
    void *moved = realloc(*ids, grown * sizeof **ids);
    if (!moved) return sel_fail(SEL_ENOMEM, "no memory for %zu token ids", grown);
    *ids = static_cast<int32_t *>(moved);
    *capacity = grown;
    return SEL_OK;
}

/* Bytes before the first U+2581. */
size_t before_sign(const char *text, size_t bytes)
{
    const void *sign = memmem(text, bytes, kSpace, 3);

    return sign ? static_cast<size_t>(static_cast<const char *>(sign) - text) : bytes;
}
} // namespace

sel_status sel_tokenizer_open(sel_tokenizer **out, const char *path)
{
    *out = nullptr;
    return guarded(path, [&] {
        std::unique_ptr<sel_tokenizer> t(new sel_tokenizer());
        SEL_TRY(load(t.get(), path));
        *out = t.release();
        return SEL_OK;
    });
}

void sel_tokenizer_close(sel_tokenizer **t)
{
    delete *t;
    *t = nullptr;
}

int64_t sel_tokenizer_size(const sel_tokenizer *t) { return static_cast<int64_t>(t->text.size()); }
int32_t sel_tokenizer_bos(const sel_tokenizer *t) { return t->bos; }
int32_t sel_tokenizer_eos(const sel_tokenizer *t) { return t->eos; }
uint32_t sel_tokenizer_crc32(const sel_tokenizer *t) { return t->crc; }

const char *sel_tokenizer_bytes(const sel_tokenizer *t, size_t *bytes)
{
    *bytes = t->model.size();
    return t->model.data();
}

sel_status sel_tokenizer_encode_part(const sel_tokenizer *t, const char *text, size_t bytes, bool start, int32_t **ids,
                                     size_t *n, size_t *capacity)
{
    *n = 0;
    return guarded(t->path.c_str(), [&]() -> sel_status {
        std::vector<int> got;
        size_t valid = 0; /* text[at .. valid) is UTF-8 */
        for (size_t at = 0; at < bytes; start = false) {
            if (at >= valid) valid = at + sel_text_valid(text + at, bytes - at);
            const size_t plain = t->exact ? before_sign(text + at, valid - at) : valid - at;
            if (plain > 0) {
                const absl::string_view piece(text + at, plain);
                const sentencepiece::util::Status s = t->encoder[start]->Encode(piece, &got);
                if (!s.ok()) return sel_fail(SEL_EFILE, "%s: %s", t->path.c_str(), one_line(s).c_str());
                SEL_TRY(grow(ids, *n, got.size(), capacity));
                std::copy(got.begin(), got.end(), *ids + *n);
                *n += got.size();
                at += plain;
            } else if (t->exact) {
                const size_t end = at + (at < valid ? 3 : 1); /* U+2581, or a byte that is not UTF-8 */
                SEL_TRY(grow(ids, *n, end - at, capacity));
                for (; at < end; at++) (*ids)[(*n)++] = t->byte_piece[static_cast<unsigned char>(text[at])];
            } else {
                return sel_fail(SEL_EFILE, "%s: byte 0x%02x at offset %zu of the text is not valid UTF-8 and the model "
                                "has no byte pieces", t->path.c_str(), static_cast<unsigned char>(text[at]), at);
            }
        }
        return SEL_OK;
    });
}

sel_status sel_tokenizer_encode(const sel_tokenizer *t, const char *text, size_t bytes, int32_t **ids, size_t *n,
                                size_t *capacity)
{
    int32_t *part = nullptr;
    size_t part_n = 0, part_capacity = 0;
    sel_status rc = SEL_OK;

    if (bytes <= SEL_TEXT_PART) return sel_tokenizer_encode_part(t, text, bytes, true, ids, n, capacity);

    *n = 0;
    for (size_t at = 0; at < bytes && rc == SEL_OK;) {
        const size_t cut = sel_text_cut(text + at, bytes - at);
        rc = sel_tokenizer_encode_part(t, text + at, cut, at == 0, &part, &part_n, &part_capacity);
        if (rc == SEL_OK) rc = grow(ids, *n, part_n, capacity);
        if (rc == SEL_OK) {
            std::copy(part, part + part_n, *ids + *n);
            *n += part_n;
        }
        at += cut;
    }
    free(part);
    return rc;
}

sel_status sel_tokenizer_decode(const sel_tokenizer *t, const int32_t *ids, size_t n, char **text, size_t *bytes)
{
    *text = nullptr;
    return guarded(t->path.c_str(), [&] {
        const bool strips = t->settings.dummy_prefix || t->settings.squeeze;
        bool at_start = true; /* where the dummy prefix would be */
        std::string out;
        for (size_t i = 0; i < n; i++) {
            const size_t id = static_cast<size_t>(ids[i]);
            if (ids[i] < 0 || id >= t->text.size())
                return sel_fail(SEL_EUSER, "token id %d is outside the tokenizer's 0 to %zu", ids[i],
                                t->text.size() - 1);
            const bool strip = at_start && strips && t->leads_with_space[id];
            out.append(t->text[id], strip ? 1 : 0, std::string::npos);
            if (!t->text[id].empty()) at_start = t->settings.squeeze && out.empty();
        }
        *text = static_cast<char *>(malloc(out.size() + 1));
        if (!*text) return sel_fail(SEL_ENOMEM, "no memory for a text of %zu bytes", out.size());
        memcpy(*text, out.c_str(), out.size() + 1);
        *bytes = out.size();
        return SEL_OK;
    });
}

/* --- training --------------------------------------------------------------------------------------------- */

namespace
{
enum { LINE_BYTES = 4096, SPECIALS = 3, BYTES = 256, CODE_POINTS = 0x110000 };

/* The lines with the smallest pseudo-random priorities, sample_bytes of them in all: a fair choice in one pass. */
class Sample
{
  public:
    Sample(uint64_t seed, size_t limit) : seed_(seed), stream_(sel_rng_stream("tokenizer.sample")), limit_(limit) {}

    void add(const char *text, size_t bytes)
    {
        uint32_t r[4];
        sel_philox(r, seed_, stream_, seen_);
        lines_.push_back({static_cast<uint64_t>(r[0]) << 32 | r[1], seen_++, std::string(text, bytes)});
        std::push_heap(lines_.begin(), lines_.end(), by_priority);
        bytes_ += bytes;
        while (bytes_ > limit_ && lines_.size() > 1) {
            std::pop_heap(lines_.begin(), lines_.end(), by_priority);
            bytes_ -= lines_.back().text.size();
            lines_.pop_back();
        }
    }

    /* In the order of the corpus, freeing the sample. */
    std::vector<std::string> take()
    {
        std::vector<std::string> texts;
        std::sort(lines_.begin(), lines_.end(), [](const Line &a, const Line &b) { return a.index < b.index; });
        for (Line &line : lines_) texts.push_back(std::move(line.text));
        lines_.clear();
        return texts;
    }

  private:
    struct Line {
        uint64_t priority, index;
        std::string text;
    };
    static bool by_priority(const Line &a, const Line &b)
    {
        return a.priority != b.priority ? a.priority < b.priority : a.index < b.index;
    }

    uint64_t seed_, stream_;
    size_t limit_, bytes_ = 0;
    uint64_t seen_ = 0;
    std::vector<Line> lines_;
};

/* Lines without their newlines, long ones cut before a space or between characters. */
void add_lines(Sample *sample, const char *text, size_t bytes)
{
    while (bytes > 0) {
        const void *newline = memchr(text, '\n', bytes);
        size_t line = newline ? static_cast<size_t>(static_cast<const char *>(newline) - text) : bytes;
        size_t used = line + (newline != nullptr);
        if (line > LINE_BYTES) {
            line = LINE_BYTES;
            while (line > LINE_BYTES / 2 && text[line] != ' ') line--;
            if (text[line] != ' ') line = LINE_BYTES;
            while (line > LINE_BYTES - 4 && (static_cast<unsigned char>(text[line]) & 0xc0) == 0x80) line--;
            used = line;
        }
        if (line > 0) sample->add(text, line);
        text += used;
        bytes -= used;
    }
}

/* The character at *p of valid UTF-8; moves on. */
uint32_t next_character(const char **p)
{
    const unsigned char c = static_cast<unsigned char>(*(*p)++);
    uint32_t code = c < 0x80 ? c : c < 0xe0 ? c & 0x1f : c < 0xf0 ? c & 0x0f : c & 0x07;

    for (int tails = c < 0x80 ? 0 : c < 0xe0 ? 1 : c < 0xf0 ? 2 : 3; tails > 0; tails--)
        code = code << 6 | (static_cast<unsigned char>(*(*p)++) & 0x3f);
    return code;
}

std::string character(uint32_t code)
{
    const int tails = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    static const unsigned char lead[] = {0x00, 0xc0, 0xe0, 0xf0};
    std::string s(1, static_cast<char>(lead[tails] | code >> (6 * tails)));

    for (int i = tails - 1; i >= 0; i--) s += static_cast<char>(0x80 | (code >> (6 * i) & 0x3f));
    return s;
}

/* Which characters become pieces.  Rare ones would crowd out words where the alphabet is large for the vocabulary
   (over 1/16 of it): then those that cover 99.95% of the text, at most half the vocabulary.  The rest are bytes.
   A sample too poor for that many words takes every character that fits (poor); *all: it took all there are. */
std::vector<bool> choose_alphabet(const std::vector<std::string> &lines, int64_t vocab, bool poor, bool *all)
{
    std::vector<int64_t> count(CODE_POINTS);
    std::vector<uint32_t> order;
    std::vector<bool> keep(CODE_POINTS);
    int64_t total = 0, covered = 0;

    for (const std::string &line : lines)
        for (const char *p = line.data(), *end = p + line.size(); p < end; total++) count[next_character(&p)]++;
    /* Not for pieces: NUL and tab (SentencePiece's own marks; bytes), its signs for space and for rare characters. */
    for (const uint32_t code : {0x0u, 0x9u, 0x20u, 0x2581u, 0x2585u}) {
        total -= count[code];
        count[code] = 0;
    }
    for (uint32_t code = 0; code < CODE_POINTS; code++)
        if (count[code] > 0) order.push_back(code);
    std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return count[a] > count[b]; });

    const size_t room = static_cast<size_t>(vocab - SPECIALS - BYTES - 1);
    const bool few = order.size() <= room / 16;
    size_t kept = 0;
    for (; kept < order.size(); kept++) {
        if (kept >= room) break;
        if (!few && !poor && kept >= room / 2) break;
        if (!few && !poor && static_cast<double>(covered) >= 0.9995 * static_cast<double>(total)) break;
        keep[order[kept]] = true;
        covered += count[order[kept]];
    }
    *all = kept == order.size();
    keep[' '] = true;
    return keep;
}

/* Cuts the lines at characters that are no pieces, so that no piece is learned across them.  Every character that is
   one comes once by itself too: the space must be there, and SentencePiece does not look inside "<s>" and the like. */
std::vector<std::string> split_at_others(const std::vector<std::string> &lines, const std::vector<bool> &keep)
{
    std::vector<std::string> sentences;

    for (const std::string &line : lines) {
        const char *p = line.data(), *const end = p + line.size(), *from = p;
        while (p < end) {
            const char *at = p;
            if (keep[next_character(&p)]) continue;
            if (at > from) sentences.emplace_back(from, at);
            from = p;
        }
        if (end > from) sentences.emplace_back(from, end);
    }
    for (uint32_t code = 0; code < CODE_POINTS; code++)
        if (keep[code]) sentences.push_back(character(code));
    return sentences;
}

class Sentences : public sentencepiece::SentenceIterator
{
  public:
    explicit Sentences(const std::vector<std::string> *all) : all_(all) {}
    bool done() const override { return at_ == all_->size(); }
    void Next() override { at_++; }
    const std::string &value() const override { return (*all_)[at_]; }
    sentencepiece::util::Status status() const override { return {}; }

  private:
    const std::vector<std::string> *all_;
    size_t at_ = 0;
};

sel_status train_failed(const sel_tokenizer_options *o, const sentencepiece::util::Status &s)
{
    const std::string line = one_line(s);
    const char *most = strstr(line.c_str(), "to a value <= ");

    if (most)
        return sel_fail(SEL_EUSER, "a vocabulary of %lld pieces is too large for this sample: at most %lld",
                        static_cast<long long>(o->vocab), strtoll(most + strlen("to a value <= "), nullptr, 10));
    return sel_fail(SEL_EUSER, "SentencePiece: %s", line.c_str());
}

/* An output that cannot be written is known before the training. */
sel_status check_output(const std::string &output)
{
    const size_t slash = output.rfind('/');
    const std::string folder = slash == std::string::npos ? "." : slash == 0 ? "/" : output.substr(0, slash);

    if (!sel_path_is_dir(folder.c_str()))
        return sel_fail(SEL_EUSER, "%s: the folder %s does not exist", output.c_str(), folder.c_str());
    if (sel_path_is_dir(output.c_str())) return sel_fail(SEL_EUSER, "%s: is a folder", output.c_str());
    return SEL_OK;
}

sel_status train(const sel_tokenizer_options *o, sel_sentence_fn *next, void *ctx, const char *output)
{
    const int64_t least = SPECIALS + BYTES + 1; /* the space */
    if (o->vocab < least || o->vocab > INT32_MAX)
        return sel_fail(SEL_EUSER, "a vocabulary of %lld pieces: expected %lld (3 specials, 256 bytes, the space) or "
                        "more", static_cast<long long>(o->vocab), static_cast<long long>(least));
    if (strcmp(o->kind, "unigram") != 0 && strcmp(o->kind, "bpe") != 0)
        return sel_fail(SEL_EUSER, "tokenizer kind \"%s\": expected unigram or bpe", o->kind);
    if (o->sample_bytes < 1)
        return sel_fail(SEL_EUSER, "a sample of %lld bytes: expected 1 or more",
                        static_cast<long long>(o->sample_bytes));
    SEL_TRY(check_output(output));

    Sample sample(o->seed, static_cast<size_t>(o->sample_bytes));
    const char *text;
    size_t bytes;
    int more;
    while ((more = next(ctx, &text, &bytes)) > 0) {
        const size_t good = sel_text_valid(text, bytes);
        if (good < bytes) return sel_fail(SEL_EFILE, "a text to train on is not valid UTF-8 at byte %zu", good);
        add_lines(&sample, text, bytes);
    }
    if (more < 0) return static_cast<sel_status>(more);

    const std::vector<std::string> lines = sample.take();
    if (lines.empty()) return sel_fail(SEL_EUSER, "there is no text to train a tokenizer on");

    const std::unordered_map<std::string, std::string> spec = {
        {"model_type", o->kind},
        {"vocab_size", std::to_string(o->vocab)},
        {"byte_fallback", "true"},
        {"normalization_rule_name", "identity"},
        {"add_dummy_prefix", "false"},
        {"remove_extra_whitespaces", "false"},
        {"character_coverage", "1.0"}, /* the sentences hold no other characters */
        {"unk_id", "0"},
        {"bos_id", "1"},
        {"eos_id", "2"},
        {"pad_id", "-1"},
        {"num_threads", std::to_string(std::min(std::max(o->threads, 1), 128))},
        {"max_sentence_length", std::to_string(1 << 20)},
        {"train_extremely_large_corpus", o->sample_bytes >= 1000000000 ? "true" : "false"},
        {"minloglevel", "2"}, /* silent: a library does not print */
    };
    for (bool poor = false;; poor = true) {
        bool all;
        std::string model;
        const std::vector<bool> alphabet = choose_alphabet(lines, o->vocab, poor, &all);
        const std::vector<std::string> sentences = split_at_others(lines, alphabet);
        Sentences iterator(&sentences);
        const sentencepiece::util::Status s = sentencepiece::SentencePieceTrainer::Train(spec, &iterator, &model);
        if (s.ok()) return sel_write_file(output, model.data(), model.size());
        if (all || poor) return train_failed(o, s);
    }
}
} // namespace

sel_status sel_tokenizer_train(const sel_tokenizer_options *o, sel_sentence_fn *next, void *ctx, const char *output)
{
    return guarded(output, [&] { return train(o, next, ctx, output); });
}
