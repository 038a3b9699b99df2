// The CUDA slicing kernel on the host, step by step, with its blocks advanced in an order that tries to do harm.
// Compiled and driven by tests/ops/test_cuda_slice_channels.py; no part of the package.
#include <cstring>
#include <random>
#include <vector>

#include "slice_index.h"

using namespace diffprune;

namespace {

enum Outcome : int64_t { kDone = 0, kDeadlock = 1, kOverwritten = 2, kOutOfRoom = 3 };
enum Schedule : int64_t { kRandom = 0, kNewestFirst = 1, kOldestStarves = 2, kWritesFirst = 3, kOldestFirst = 4 };
enum class Step { ticket, read, flag, wait, write, finished };

struct Block {
  Step step = Step::ticket;
  int64_t tile = -1, next = -1;
  int entry = 0;
  Tile t{};
  uint32_t row = 0;  // rows that have been read
  int64_t seen = 0;  // the frontier when the tile was taken: it may be out of date
  std::vector<unsigned char> stage, out;
};

struct Table {
  const TiledEntry* entries;
  int64_t n_entries;
  const int32_t* tile_entry;
  int64_t tiles;
};

unsigned char* bytes(int64_t address) { return reinterpret_cast<unsigned char*>(address); }

class Simulation {
 public:
  Simulation(const Table& table, int64_t blocks, int64_t schedule, uint64_t seed, int64_t slack)
      : table_(table),
        blocks_(blocks),
        schedule_(schedule),
        random_(seed),
        slack_(slack),
        read_(table.tiles),
        frontier_(table.n_entries) {}

  int64_t run() {
    for (auto& block : blocks_) block.next = ticket_++;
    for (;;) {
      Block* block = choose();
      if (!block) break;
      advance(*block);
      if (outcome_ != kDone) return outcome_;
    }
    for (const auto& block : blocks_)
      if (block.step != Step::finished) return kDeadlock;
    return kDone;
  }

 private:
  bool enabled(const Block& b) const {
    if (b.step == Step::finished) return false;
    if (b.step != Step::wait) return true;
    const TiledEntry& e = table_.entries[b.entry];
    const int64_t last = last_conflict(e, static_cast<uint32_t>(b.tile - e.first_tile), b.t) - slack_;
    for (int64_t j = b.seen; j <= last; ++j)
      if (!read_[e.first_tile + j]) return false;
    return true;
  }

  Block* choose() {
    std::vector<Block*> able;
    for (auto& block : blocks_)
      if (enabled(block)) able.push_back(&block);
    if (able.empty()) return nullptr;
    const auto tile = [](const Block* b) { return b->step == Step::ticket ? b->next : b->tile; };
    Block* best = able[random_() % able.size()];
    for (Block* b : able) {
      if (schedule_ == kNewestFirst && tile(b) > tile(best)) best = b;
      if (schedule_ == kOldestFirst && tile(b) < tile(best)) best = b;
      // reads of the lowest tile wait until nothing else can move
      if (schedule_ == kOldestStarves && tile(b) > tile(best) && b->step != Step::finished) best = b;
      if (schedule_ == kWritesFirst && b->step >= Step::wait && best->step < Step::wait) best = b;
    }
    if (schedule_ == kOldestStarves && random_() % 8 == 0) best = able[random_() % able.size()];
    return best;
  }

  void advance(Block& b) {
    const TiledEntry& e = table_.entries[b.entry];
    switch (b.step) {
      case Step::ticket:
        take(b);
        return;
      case Step::read:
        if (b.t.kept_n && b.row < b.t.rows) return read_row(b, e);
        compact(b, e);
        b.step = Step::flag;
        return;
      case Step::flag:
        read_[b.tile] = 1;
        b.step = Step::wait;
        return;
      case Step::wait: {
        const int64_t last = last_conflict(e, static_cast<uint32_t>(b.tile - e.first_tile), b.t);
        if (last + 1 > frontier_[b.entry]) frontier_[b.entry] = last + 1;
        b.next = ticket_++;
        b.step = Step::write;
        return;
      }
      case Step::write:
        write(b, e);
        b.step = Step::ticket;
        return;
      case Step::finished:
        return;
    }
  }

  void take(Block& b) {
    b.tile = b.next;
    if (b.tile >= table_.tiles) {
      b.step = Step::finished;
      return;
    }
    b.entry = table_.tile_entry[b.tile];
    const TiledEntry& e = table_.entries[b.entry];
    b.t = describe(e, static_cast<uint32_t>(b.tile - e.first_tile));
    b.row = 0;
    b.seen = frontier_[b.entry];
    b.stage.assign(kStageBytes, 0xA5);
    if (b.t.rows > static_cast<uint32_t>(kMaxRows) || slot_bytes(e, b.t) * b.t.rows > kStageBytes)
      outcome_ = kOutOfRoom;
    b.step = Step::read;
  }

  uint32_t offset(const Block& b, const TiledEntry& e, uint32_t row) const {
    return static_cast<uint32_t>(e.address + (read_begin(e, b.t, row) << e.log2_element)) % kVector;
  }

  void read_row(Block& b, const TiledEntry& e) {
    const int64_t from = e.address + (read_begin(e, b.t, b.row) << e.log2_element);
    const uint32_t size = b.t.width * static_cast<uint32_t>(e.c) << e.log2_element;
    std::memcpy(b.stage.data() + b.row * slot_bytes(e, b.t) + offset(b, e, b.row), bytes(from), size);
    ++b.row;
  }

  void compact(Block& b, const TiledEntry& e) {
    const uint32_t n = write_count(e, b.t), element = 1u << e.log2_element;
    b.out.resize(static_cast<size_t>(n) * element);
    if (e.straight) {
      std::memcpy(b.out.data(), b.stage.data(), b.out.size());
      return;
    }
    if (n == 0) return;
    const Divisor c = divisor(static_cast<uint32_t>(e.c)), row_length = divisor(b.t.kept_n * c.value);
    for (uint32_t q = 0; q < n; ++q) {
      const Place from = place(e, b.t, q, row_length, c);
      const size_t at = from.row * slot_bytes(e, b.t) + offset(b, e, from.row) + from.element * element;
      std::memcpy(b.out.data() + q * element, b.stage.data() + at, element);
    }
  }

  void write(const Block& b, const TiledEntry& e) {
    const int64_t begin = write_begin(e, b.t), end = begin + write_count(e, b.t);
    for (int64_t j = 0; j < e.tiles; ++j) {
      if (read_[e.first_tile + j]) continue;
      const Tile other = describe(e, static_cast<uint32_t>(j));
      for (uint32_t r = 0; r < other.rows && other.kept_n; ++r) {
        const int64_t from = read_begin(e, other, r);
        if (from < end && from + other.width * e.c > begin) outcome_ = kOverwritten;
      }
    }
    std::memcpy(bytes(e.address + (begin << e.log2_element)), b.out.data(), b.out.size());
  }

  Table table_;
  std::vector<Block> blocks_;
  int64_t schedule_;
  std::mt19937_64 random_;
  int64_t slack_;
  std::vector<char> read_;
  std::vector<int64_t> frontier_;
  int64_t ticket_ = 0;
  int64_t outcome_ = kDone;
};

}  // namespace

extern "C" {

// Slices all entries in place with `blocks` blocks. slack: how many tiles less than it should a block waits for.
int64_t simulate(const TiledEntry* entries, int64_t n_entries, const int32_t* tile_entry, int64_t tiles, int64_t blocks,
                 int64_t schedule, uint64_t seed, int64_t slack) {
  return Simulation({entries, n_entries, tile_entry, tiles}, blocks, schedule, seed, slack).run();
}

// out: the last tile that `tile` waits for; the last one that really reads what it writes; and the last one before it
// that starts to read below the end of what it writes.
void conflicts(const TiledEntry* entry, int64_t tile, int64_t* out) {
  const TiledEntry& e = *entry;
  const Tile t = describe(e, static_cast<uint32_t>(tile));
  const int64_t begin = write_begin(e, t), end = begin + write_count(e, t);
  out[0] = last_conflict(e, static_cast<uint32_t>(tile), t);
  out[1] = out[2] = -1;
  for (int64_t j = 0; j < tile && end > begin; ++j) {
    const Tile other = describe(e, static_cast<uint32_t>(j));
    if (read_begin(e, other, 0) < end) out[2] = j;
    for (uint32_t r = 0; r < other.rows; ++r) {
      const int64_t from = read_begin(e, other, r);
      if (from < end && from + other.width * e.c > begin) out[1] = j;
    }
  }
}

// Whether quotient() is n / d for every n < 2^16 where it could be off, for this d.
int64_t quotient_is_exact(int64_t d) {
  const Divisor by = divisor(static_cast<uint32_t>(d));
  for (int64_t n = 0; n < (1 << 16); n += d)
    for (int64_t m : {n - 1, n, n + 1})
      if (m >= 0 && quotient(static_cast<uint32_t>(m), by) != m / d) return 0;
  return 1;
}

int64_t entry_bytes() { return sizeof(TiledEntry); }

}  // extern "C"
