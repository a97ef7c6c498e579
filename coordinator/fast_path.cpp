// Tokens that need nothing but their text and an event around it: from a worker's step to the connections of their
// clients. Who enters and leaves, and why, is in fast_path.py.
//
//     step:   handle -> Stream -> in order? -> text -> event -> send(2)
//
// There are no locks: the thread of the event loop calls everything.

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace {

enum Outcome : uint8_t {
    REFUSED = 0,  // nothing was done: this token has to take the slow path
    TAKEN = 1,
    HELD_UP = 2,  // taken, but the connection has no room: the rest of the event is in `unsent`, and no more is taken
    UNKNOWN = 3,  // nothing was done: the text of this token has to be told
};

// xxh32 of 32-bit words, one at a time, after the specification (github.com/Cyan4973/xxHash, doc/xxhash_spec.md).
class Digest {
  public:
    void add(uint32_t word) {
        rest_[count_ % 4] = word;
        if (++count_ % 4 == 0)
            for (int lane = 0; lane < 4; ++lane) lanes_[lane] = rotated(lanes_[lane] + rest_[lane] * P2, 13) * P1;
    }

    uint32_t value() const {
        uint32_t hash = P5;
        if (count_ >= 4)
            hash = rotated(lanes_[0], 1) + rotated(lanes_[1], 7) + rotated(lanes_[2], 12) + rotated(lanes_[3], 18);
        hash += 4 * count_;
        for (uint32_t at = 0; at < count_ % 4; ++at) hash = rotated(hash + rest_[at] * P3, 17) * P4;
        hash = (hash ^ hash >> 15) * P2;
        hash = (hash ^ hash >> 13) * P3;
        return hash ^ hash >> 16;
    }

    uint32_t count() const { return count_; }

  private:
    static constexpr uint32_t P1 = 2654435761u, P2 = 2246822519u, P3 = 3266489917u, P4 = 668265263u, P5 = 374761393u;

    static uint32_t rotated(uint32_t value, int bits) { return value << bits | value >> (32 - bits); }

    uint32_t lanes_[4] = {P1 + P2, P2, 0, 0 - P1};
    uint32_t rest_[4] = {};
    uint32_t count_ = 0;
};

struct Text {
    bool known = false;
    bool whole = false;  // characters, not parts of some
    std::string bytes;
};

using Texts = std::vector<Text>;

// Of seconds between tokens; the memory is Python's.
struct Histogram {
    const double *bounds;
    int64_t num_bounds;
    int64_t *counts;
    double *sum;

    void observe(double seconds) const {
        ++counts[std::lower_bound(bounds, bounds + num_bounds, seconds) - bounds];
        *sum += seconds;
    }
};

// What Python reads; fast_path.py has the same.
struct Progress {
    double last_token_s, last_write_s;
    const uint32_t *taken;
    int64_t num_taken;
    const char *unsent, *begun;
    int64_t num_unsent, num_begun;
};

struct Stream {
    Stream() = default;
    Stream(const Stream &) = delete;
    ~Stream() {
        if (socket >= 0) close(socket);
    }

    Progress progress{};  // first
    int socket = -1;
    uint32_t end = 0;  // index of the token that `max_tokens` makes the last one
    bool held_up = false;
    const Texts *texts = nullptr;
    Histogram gaps{};
    Digest digest;
    std::vector<uint32_t> stops, taken;
    std::string before, between, after, unsent;
    std::string begun;  // the beginning of a character
};

using Streams = std::unordered_map<uint64_t, Stream *>;

// Length of the character that `bytes` begin with; 0 if they end within it; of what can be none: -length, at most 3.
int character(std::string_view bytes) {
    const uint8_t lead = uint8_t(bytes[0]);
    if (lead < 0x80) return 1;
    if (lead < 0xC2 || lead > 0xF4) return -1;
    const int length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    for (int at = 1; at < length; ++at) {
        if (size_t(at) == bytes.size()) return 0;
        // Overlong forms, surrogates and what is above U+10FFFF end with their second byte.
        const uint8_t low = at > 1 ? 0x80 : lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
        const uint8_t high = at > 1 ? 0xBF : lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
        if (uint8_t(bytes[at]) < low || uint8_t(bytes[at]) > high) return -at;
    }
    return length;
}

void append_hex(std::string &to, uint32_t value, int min_digits) {
    char digits[8];
    int count = 0;
    do digits[count++] = "0123456789abcdef"[value & 15];
    while ((value >>= 4) || count < min_digits);
    while (count) to += digits[--count];
}

// As it stands between the quotes of JSON; returns what is left, the beginning of a character.
std::string_view append_json(std::string &to, std::string_view bytes) {
    while (!bytes.empty()) {
        const int length = character(bytes);
        if (!length) break;
        const uint8_t lead = uint8_t(bytes[0]);
        if (length < 0) {
            to += "\xEF\xBF\xBD";
        } else if (lead == '"' || lead == '\\') {
            (to += '\\') += char(lead);
        } else if (lead < 0x20) {
            static const char *const names = "btn?fr";  // of 8 to 13
            to += '\\';
            if (lead >= 8 && lead <= 13 && lead != 11)
                to += names[lead - 8];
            else
                append_hex(to += 'u', lead, 4);
        } else {
            to += bytes.substr(0, length);
        }
        bytes.remove_prefix(length < 0 ? -length : length);
    }
    return bytes;
}

Outcome take(Stream &stream, uint32_t index, uint32_t token, double now_s) {
    if (stream.held_up || index != stream.digest.count() || index >= stream.end) return REFUSED;
    for (uint32_t stop : stream.stops)
        if (token == stop) return REFUSED;
    if (token >= stream.texts->size() || !(*stream.texts)[token].known) return UNKNOWN;
    const Text &text = (*stream.texts)[token];

    static std::string json, chunk;
    json.clear();
    if (stream.begun.empty() && text.whole) {
        append_json(json, text.bytes);
    } else {
        stream.begun += text.bytes;
        stream.begun = std::string(append_json(json, stream.begun));
    }
    Progress &progress = stream.progress;
    progress.begun = stream.begun.data(), progress.num_begun = int64_t(stream.begun.size());
    stream.digest.add(token);
    stream.taken.push_back(token);
    progress.taken = stream.taken.data(), progress.num_taken = int64_t(stream.taken.size());
    stream.gaps.observe(now_s - progress.last_token_s);
    progress.last_token_s = now_s;
    if (json.empty()) return TAKEN;

    const std::string had = std::to_string(index + 1) + '-';
    const size_t size = stream.before.size() + had.size() + 8 + stream.between.size() + json.size() + 2 + stream.after.size();
    chunk.clear();
    append_hex(chunk, uint32_t(size), 1);
    ((chunk += "\r\n") += stream.before) += had;
    append_hex(chunk, stream.digest.value(), 8);
    ((((chunk += stream.between) += '"') += json) += '"') += stream.after;
    chunk += "\r\n";

    ssize_t sent;
    do sent = send(stream.socket, chunk.data(), chunk.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    progress.last_write_s = now_s;
    if (sent == ssize_t(chunk.size())) return TAKEN;
    // Whatever is wrong with it, whoever writes next finds out.
    stream.unsent.assign(chunk, sent < 0 ? 0 : size_t(sent), std::string::npos);
    progress.unsent = stream.unsent.data(), progress.num_unsent = int64_t(stream.unsent.size());
    stream.held_up = true;
    return HELD_UP;
}

}  // namespace

extern "C" {

// Behind it are the parts, as fast_path.py packs them.
struct Opening {
    int64_t socket, end;
    Texts *texts;
    Histogram gaps;
    double last_token_s;
    int64_t sizes[6];
};

Texts *texts_new() { return new Texts; }
void texts_free(Texts *texts) { delete texts; }
void texts_set(Texts *texts, uint32_t token, const char *bytes, int64_t size, bool whole) {
    if (token >= texts->size()) texts->resize(token + 1);
    (*texts)[token] = {true, whole, {bytes, size_t(size)}};
}

Streams *streams_new() { return new Streams; }
void streams_free(Streams *streams) { delete streams; }

// Null where the connection has no descriptor, or there is none for a copy: nobody may get its number while it is written to.
Stream *stream_enter(Streams *streams, uint64_t handle, const Opening *opening) {
    const int socket = fcntl(int(opening->socket), F_DUPFD_CLOEXEC, 0);
    if (socket < 0) return nullptr;
    const char *at = reinterpret_cast<const char *>(opening + 1);
    const int64_t *size = opening->sizes;
    auto words = [&] {
        const auto *first = reinterpret_cast<const uint32_t *>(at);
        at += *size;
        return std::vector<uint32_t>(first, first + *size++ / 4);
    };
    Stream *stream = (*streams)[handle] = new Stream;
    stream->socket = socket;
    stream->end = uint32_t(opening->end);
    stream->texts = opening->texts;
    stream->gaps = opening->gaps;
    for (uint32_t token : words()) stream->digest.add(token);
    stream->stops = words();
    for (std::string *part : {&stream->begun, &stream->before, &stream->between, &stream->after}) {
        part->assign(at, size_t(*size));
        at += *size++;
    }
    stream->progress.last_token_s = opening->last_token_s;
    return stream;
}

// Python has seen what was taken.
void stream_told(Stream *stream) {
    stream->taken.clear();
    stream->progress.num_taken = 0;
}

void stream_leave(Streams *streams, uint64_t handle) {
    const auto found = streams->find(handle);
    delete found->second;
    streams->erase(found);
}

void step(Streams *streams, const uint64_t *handles, const uint32_t *indices, const uint32_t *tokens, int64_t count,
          double now_s, uint8_t *outcomes) {
    for (int64_t at = 0; at < count; ++at) {
        const auto found = streams->find(handles[at]);
        outcomes[at] = found == streams->end() ? REFUSED : take(*found->second, indices[at], tokens[at], now_s);
    }
}
}
