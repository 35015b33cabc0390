// Which pages hold the KV of which tokens, in all tiers.
#pragma once

#include <array>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace nf {

constexpr int64_t kNumTiers = 3;
constexpr int32_t kNoPage = -1;
constexpr int64_t kMaxPageSize = 65536;

// A node was named that is not in the index.
struct NodeGone : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A tree of full pages. The path from a root to a node spells the tokens of a prefix; a root is the empty prefix of its
// salt. What is promised is written in nf_kvcache/index.py; here is how it is quick.
//
// A million nodes do not fit into a processor's cache, and each page of a prompt lies somewhere else in memory. So a node
// is found in two steps, each of which reads one place: an entry of a hash table (8 bytes: 32 bits of the hash, and the
// slot), then the record in that slot (header and tokens, side by side). A walk computes the hashes of a block of pages
// and asks for all their entries, then for all their records, before it needs the first: their way from memory overlaps.
//
// The hash of a page covers the tokens from the root on: that of its parent goes into it. It only says where to look;
// what is found counts if its parent and its tokens are those asked for. It is keyed at random, so that no prompt can be
// made up whose pages collide.
//
// Slots are reused, names are not: a name is the slot (lower 32 bits) and how often the slot was taken (upper bits).
// Memory per node at a page size of 16: 96 bytes for the record, 4 for the holders, 11 to 21 for the table.
//
// Arguments are checked before anything changes: std::invalid_argument, NodeGone. Not thread-safe.
class PrefixIndex {
 public:
  using Name = int64_t;
  using Pages = std::array<int32_t, kNumTiers>;

  // With hash_bits below 64 only so many bits of a hash differ, so that tests see collisions.
  PrefixIndex(int64_t page_size, int64_t hash_bits);

  int64_t page_size() const { return page_size_; }
  int64_t size() const { return num_nodes_; }

  struct Path {
    std::vector<Name> nodes;
    std::vector<Pages> pages;
  };
  // The result is valid until the next call.
  const Path& walk(std::string_view salt, const int32_t* tokens, int64_t num_tokens);

  Name root(std::string_view salt);
  Name extend(Name node, const int32_t* tokens);
  void place(Name node, int64_t tier, int64_t page);
  void displace(Name node, int64_t tier);
  void hold(Name node);
  void unhold(Name node);
  // For each of `count` held nodes, moves one hold to the prefix that is longer by its page_size tokens, and places that
  // in its page of the tier unless it has one there. Writes the longer prefixes over the nodes.
  void advance(Name* nodes, const int32_t* tokens, int64_t tier, const int32_t* pages, bool* placed, int64_t count);

  bool is_alive(Name node) const;
  int32_t page(Name node, int64_t tier) const;
  Name parent(Name node) const;
  const std::string& salt(Name node) const;
  // page_size tokens; nullptr for a root.
  const int32_t* tokens(Name node) const;
  int64_t num_children(Name node) const { return record(slot_of(node)).children; }
  int64_t holders(Name node) const { return holders_[slot_of(node)]; }
  bool holds(const Name* nodes, int64_t tier, const int32_t* pages, int64_t count) const;
  std::vector<Name> nodes() const;

  // Compares what is kept twice. Throws std::runtime_error.
  void check_integrity() const;

 private:
  using Slot = uint32_t;
  using Entry = uint64_t;  // upper half: the upper half of the hash; lower half: the slot

  struct Record {
    uint64_t hash;
    Slot parent;  // or kRootMark, kFreeMark
    Pages pages;
    uint32_t generation;  // of the slot; in a free one that of its next node
    uint32_t children;    // in a free slot the next free one
    // followed by the tokens
  };
  static_assert(sizeof(Record) == 32);

  struct FreeMemory {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  struct SaltHash {
    using is_transparent = void;
    std::size_t operator()(std::string_view salt) const { return std::hash<std::string_view>()(salt); }
  };

  static constexpr Slot kNone = 0xffffffff;
  static constexpr Slot kRootMark = 0xffffffff;
  static constexpr Slot kFreeMark = 0xfffffffe;
  static constexpr Entry kEmpty = 0xffffffff;
  static constexpr uint32_t kLastGeneration = 0x7fffffff;
  static constexpr int kChunkBits = 10;  // records per chunk: growing one chunk at a time never copies records

  Record& record(Slot slot) const {
    std::byte* chunk = chunks_[slot >> kChunkBits].get();
    return *reinterpret_cast<Record*>(chunk + (slot & ((1u << kChunkBits) - 1)) * stride_);
  }
  int32_t* tokens_of(Record& r) const { return reinterpret_cast<int32_t*>(&r + 1); }
  Name name_of(Slot slot) const { return static_cast<Name>(record(slot).generation) << 32 | slot; }
  Slot slot_of(Name node) const;
  static void check_tier(int64_t tier);

  struct Digest {
    uint64_t low, high;
  };
  Digest digest(const int32_t* tokens) const;
  uint64_t chain(uint64_t parent_hash, Digest digest) const;

  static uint32_t tag_of(uint64_t hash) { return static_cast<uint32_t>(hash >> 32); }
  // Where an entry belongs. Entries lie in the order of their tags, so that a table that grows is read and written once
  // from its beginning to its end.
  std::size_t home(uint32_t tag) const { return tag >> shift_; }
  Slot find(Slot parent, uint64_t hash, const int32_t* tokens) const;
  bool matches(Slot slot, Slot parent, const int32_t* tokens) const;
  void insert(std::vector<Entry>& table, Entry entry) const;
  void erase(Slot slot);
  void grow_table();

  Slot take_slot(Slot parent, uint64_t hash);
  void prune(Slot slot);

  int64_t page_size_;
  uint64_t hash_mask_;
  std::size_t stride_;
  std::vector<uint64_t> keys_;  // one per two tokens
  uint64_t chain_keys_[3];

  std::vector<std::unique_ptr<std::byte, FreeMemory>> chunks_;
  std::vector<uint32_t> holders_;  // by slot; its size is the number of slots
  Slot free_ = kNone;
  int64_t num_nodes_ = 0;
  std::unordered_map<std::string, Slot, SaltHash, std::equal_to<>> roots_;
  std::unordered_map<Slot, const std::string*> salts_;  // the keys of roots_

  std::vector<Entry> table_;  // a power of two of them
  std::size_t mask_;
  int shift_;

  Path path_;
};

}  // namespace nf
