#include "prefix_index.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <random>

namespace nf {
namespace {

__extension__ using Wide = unsigned __int128;

constexpr int64_t kBlock = 64;  // pages whose memory is asked for at once
constexpr int64_t kFirstBlock = 8;
constexpr std::size_t kLine = 64;

uint64_t fold(uint64_t a, uint64_t b) {
  const Wide product = static_cast<Wide>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }

std::string str(int64_t value) { return std::to_string(value); }

}  // namespace

PrefixIndex::PrefixIndex(int64_t page_size, int64_t hash_bits)
    : page_size_(page_size), table_(16, kEmpty), mask_(15), shift_(28) {
  if (page_size < 1 || page_size > kMaxPageSize) {
    throw std::invalid_argument("page_size is " + str(page_size) + "; expected 1 to " + str(kMaxPageSize) + ".");
  }
  if (hash_bits < 0 || hash_bits > 64) {
    throw std::invalid_argument("hash_bits is " + str(hash_bits) + "; expected 0 to 64.");
  }
  hash_mask_ = hash_bits == 0 ? 0 : ~uint64_t{0} << (64 - hash_bits);
  // Multiples of 32 bytes: a record of 96 then never touches a third cache line.
  const std::size_t bytes = sizeof(Record) + static_cast<std::size_t>(page_size) * sizeof(int32_t);
  stride_ = (bytes + 31) / 32 * 32;
  std::random_device random;
  const auto random64 = [&random] { return static_cast<uint64_t>(random()) << 32 | random(); };
  keys_.resize(static_cast<std::size_t>((page_size + 3) / 4) * 2);
  std::generate(keys_.begin(), keys_.end(), random64);
  std::generate(std::begin(chain_keys_), std::end(chain_keys_), random64);
}

// NH (Black et al., UMAC, 1999): for two different pages equal sums have a probability of 2^-64 over the keys.
PrefixIndex::Digest PrefixIndex::digest(const int32_t* tokens) const {
  Wide sum = 0;
  const uint64_t* key = keys_.data();
  uint64_t words[2];
  int64_t i = 0;
  for (; i + 4 <= page_size_; i += 4, key += 2) {
    std::memcpy(words, tokens + i, sizeof words);
    sum += static_cast<Wide>(words[0] + key[0]) * (words[1] + key[1]);
  }
  if (i < page_size_) {
    words[0] = words[1] = 0;
    std::memcpy(words, tokens + i, static_cast<std::size_t>(page_size_ - i) * sizeof(int32_t));
    sum += static_cast<Wide>(words[0] + key[0]) * (words[1] + key[1]);
  }
  return {static_cast<uint64_t>(sum), static_cast<uint64_t>(sum >> 64)};
}

uint64_t PrefixIndex::chain(uint64_t parent_hash, Digest digest) const {
  const uint64_t mixed = fold(parent_hash ^ digest.low ^ chain_keys_[0], digest.high ^ chain_keys_[1]);
  return fold(mixed ^ chain_keys_[0], chain_keys_[2] | 1) & hash_mask_;
}

PrefixIndex::Slot PrefixIndex::slot_of(Name node) const {
  if (!is_alive(node)) {
    throw NodeGone("Node " + str(node) + " is not in the index: it was removed when it had no page, child and holder " +
                   "left, or never was there.");
  }
  return static_cast<Slot>(node);
}

bool PrefixIndex::is_alive(Name node) const {
  const Slot slot = static_cast<Slot>(node);
  if (node <= 0 || slot >= holders_.size()) return false;
  const Record& r = record(slot);
  return r.parent != kFreeMark && r.generation == static_cast<uint64_t>(node) >> 32;
}

void PrefixIndex::check_tier(int64_t tier) {
  if (tier < 0 || tier >= kNumTiers) {
    throw std::invalid_argument("tier is " + str(tier) + "; expected 0 (device), 1 (host) or 2 (disk).");
  }
}

bool PrefixIndex::matches(Slot slot, Slot parent, const int32_t* tokens) const {
  Record& r = record(slot);
  return r.parent == parent &&
         std::memcmp(tokens_of(r), tokens, static_cast<std::size_t>(page_size_) * sizeof(int32_t)) == 0;
}

PrefixIndex::Slot PrefixIndex::find(Slot parent, uint64_t hash, const int32_t* tokens) const {
  const uint32_t tag = tag_of(hash);
  for (std::size_t at = home(tag);; at = (at + 1) & mask_) {
    const Slot slot = static_cast<Slot>(table_[at]);
    if (slot == kNone) return kNone;
    if (table_[at] >> 32 == tag && matches(slot, parent, tokens)) return slot;
  }
}

const PrefixIndex::Path& PrefixIndex::walk(std::string_view salt, const int32_t* tokens, int64_t num_tokens) {
  path_.nodes.clear();
  path_.pages.clear();
  const auto root = roots_.find(salt);
  if (root == roots_.end()) return path_;

  uint64_t hashes[kBlock];
  Slot candidates[kBlock];
  Slot parent = root->second;
  uint64_t hash = record(parent).hash;
  const std::size_t near_bytes = std::min(stride_, 4 * kLine);  // the processor goes on by itself from there
  const int64_t num_pages = num_tokens / page_size_;
  // Blocks grow: little is asked for in vain where nothing is found.
  for (int64_t start = 0, block = kFirstBlock; start < num_pages; start += block, block = std::min(2 * block, kBlock)) {
    int64_t count = std::min(block, num_pages - start);
    const int64_t asked = count;
    for (int64_t i = 0; i < count; ++i) {
      hashes[i] = hash = chain(hash, digest(tokens + (start + i) * page_size_));
      prefetch(&table_[home(tag_of(hash))]);
    }
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t tag = tag_of(hashes[i]);
      std::size_t at = home(tag);
      while (table_[at] >> 32 != tag && static_cast<Slot>(table_[at]) != kNone) at = (at + 1) & mask_;
      candidates[i] = static_cast<Slot>(table_[at]);
      if (candidates[i] == kNone) {
        count = i;
        break;
      }
      const auto* bytes = reinterpret_cast<const std::byte*>(&record(candidates[i]));
      for (std::size_t line = 0; line < near_bytes; line += kLine) prefetch(bytes + line);
      prefetch(bytes + near_bytes - 1);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int32_t* page_tokens = tokens + (start + i) * page_size_;
      Slot slot = candidates[i];
      if (!matches(slot, parent, page_tokens)) slot = find(parent, hashes[i], page_tokens);
      if (slot == kNone) return path_;
      const Record& r = record(slot);
      if (std::all_of(r.pages.begin(), r.pages.end(), [](int32_t page) { return page == kNoPage; })) return path_;
      path_.nodes.push_back(name_of(slot));
      path_.pages.push_back(r.pages);
      parent = slot;
    }
    if (count < asked) return path_;
  }
  return path_;
}

PrefixIndex::Name PrefixIndex::root(std::string_view salt) {
  const auto found = roots_.find(salt);
  if (found != roots_.end()) return name_of(found->second);
  const uint64_t hash = fold(SaltHash()(salt) ^ chain_keys_[1], chain_keys_[2] | 1) & hash_mask_;
  const Slot slot = take_slot(kRootMark, hash);
  const auto added = roots_.emplace(salt, slot).first;
  salts_.emplace(slot, &added->first);
  return name_of(slot);
}

PrefixIndex::Name PrefixIndex::extend(Name node, const int32_t* tokens) {
  const Slot parent = slot_of(node);
  const uint64_t hash = chain(record(parent).hash, digest(tokens));
  const Slot found = find(parent, hash, tokens);
  if (found != kNone) return name_of(found);
  if ((static_cast<std::size_t>(num_nodes_) + 1) * 4 > table_.size() * 3) grow_table();
  const Slot slot = take_slot(parent, hash);
  std::memcpy(tokens_of(record(slot)), tokens, static_cast<std::size_t>(page_size_) * sizeof(int32_t));
  insert(table_, static_cast<Entry>(tag_of(hash)) << 32 | slot);
  ++record(parent).children;
  return name_of(slot);
}

void PrefixIndex::place(Name node, int64_t tier, int64_t page) {
  Record& r = record(slot_of(node));
  check_tier(tier);
  if (page < 0 || page > INT32_MAX) {
    throw std::invalid_argument("page is " + str(page) + "; expected 0 to " + str(INT32_MAX) + ".");
  }
  if (r.parent == kRootMark) {
    throw std::invalid_argument("node " + str(node) + " is a root, the empty prefix; it has no KV to place.");
  }
  r.pages[static_cast<std::size_t>(tier)] = static_cast<int32_t>(page);
}

void PrefixIndex::displace(Name node, int64_t tier) {
  const Slot slot = slot_of(node);
  check_tier(tier);
  int32_t& page = record(slot).pages[static_cast<std::size_t>(tier)];
  if (page == kNoPage) {
    throw std::invalid_argument("node " + str(node) + " has no page in tier " + str(tier) + " to displace.");
  }
  page = kNoPage;
  prune(slot);
}

void PrefixIndex::hold(Name node) { ++holders_[slot_of(node)]; }

void PrefixIndex::unhold(Name node) {
  const Slot slot = slot_of(node);
  if (holders_[slot] == 0) {
    throw std::invalid_argument("node " + str(node) + " is not held; every unhold undoes one hold.");
  }
  --holders_[slot];
  prune(slot);
}

void PrefixIndex::advance(Name* nodes, const int32_t* tokens, int64_t tier, const int32_t* pages, bool* placed,
                          int64_t count) {
  check_tier(tier);
  std::unordered_map<Slot, uint32_t> holds;
  for (int64_t i = 0; i < count; ++i) {
    const Slot slot = slot_of(nodes[i]);
    if (++holds[slot] > holders_[slot]) {
      throw std::invalid_argument("node " + str(nodes[i]) + " is not held; advance moves a hold of each node.");
    }
    if (pages[i] < 0) {
      throw std::invalid_argument("page is " + str(pages[i]) + "; expected 0 to " + str(INT32_MAX) + ".");
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const Name next = extend(nodes[i], tokens + i * page_size_);
    Record& r = record(slot_of(next));
    int32_t& page = r.pages[static_cast<std::size_t>(tier)];
    placed[i] = page == kNoPage;
    if (placed[i]) page = pages[i];
    ++holders_[slot_of(next)];
    --holders_[slot_of(nodes[i])];  // it stays: it has a child now
    nodes[i] = next;
  }
}

int32_t PrefixIndex::page(Name node, int64_t tier) const {
  const Slot slot = slot_of(node);
  check_tier(tier);
  return record(slot).pages[static_cast<std::size_t>(tier)];
}

PrefixIndex::Name PrefixIndex::parent(Name node) const {
  const Slot parent = record(slot_of(node)).parent;
  return parent == kRootMark ? 0 : name_of(parent);
}

const std::string& PrefixIndex::salt(Name node) const {
  const auto found = salts_.find(slot_of(node));
  if (found == salts_.end()) {
    throw std::invalid_argument("node " + str(node) + " is not a root; only roots have a salt.");
  }
  return *found->second;
}

const int32_t* PrefixIndex::tokens(Name node) const {
  Record& r = record(slot_of(node));
  return r.parent == kRootMark ? nullptr : tokens_of(r);
}

bool PrefixIndex::holds(const Name* nodes, int64_t tier, const int32_t* pages, int64_t count) const {
  check_tier(tier);
  for (int64_t i = 0; i < count; ++i) {
    if (!is_alive(nodes[i]) || pages[i] == kNoPage) return false;
    if (record(static_cast<Slot>(nodes[i])).pages[static_cast<std::size_t>(tier)] != pages[i]) return false;
  }
  return true;
}

std::vector<PrefixIndex::Name> PrefixIndex::nodes() const {
  std::vector<Name> names;
  names.reserve(static_cast<std::size_t>(num_nodes_));
  for (Slot slot = 0; slot < holders_.size(); ++slot) {
    if (record(slot).parent != kFreeMark) names.push_back(name_of(slot));
  }
  return names;
}

PrefixIndex::Slot PrefixIndex::take_slot(Slot parent, uint64_t hash) {
  Slot slot = free_;
  if (slot == kNone) {
    if (holders_.size() >= kFreeMark) throw std::length_error("A prefix index holds at most 2^32 - 2 nodes.");
    slot = static_cast<Slot>(holders_.size());
    const std::size_t chunk_bytes = stride_ << kChunkBits;
    if (slot >> kChunkBits == chunks_.size()) {
      auto* memory = static_cast<std::byte*>(std::aligned_alloc(kLine, chunk_bytes));
      if (memory == nullptr) throw std::bad_alloc();
      chunks_.emplace_back(memory);
    }
    holders_.push_back(0);
    record(slot).generation = 1;
  } else {
    free_ = record(slot).children;
  }
  Record& r = record(slot);
  r.hash = hash;
  r.parent = parent;
  r.pages.fill(kNoPage);
  r.children = 0;
  ++num_nodes_;
  return slot;
}

void PrefixIndex::prune(Slot slot) {
  while (true) {
    Record& r = record(slot);
    const bool has_page = std::any_of(r.pages.begin(), r.pages.end(), [](int32_t page) { return page != kNoPage; });
    if (has_page || r.children > 0 || holders_[slot] > 0) return;
    const Slot parent = r.parent;
    if (parent == kRootMark) {
      const auto salt = salts_.find(slot);
      roots_.erase(roots_.find(*salt->second));
      salts_.erase(salt);
    } else {
      erase(slot);
    }
    r.parent = kFreeMark;
    --num_nodes_;
    // A slot whose generations are used up is not taken again: no name means two nodes.
    if (r.generation < kLastGeneration) {
      ++r.generation;
      r.children = free_;
      free_ = slot;
    }
    if (parent == kRootMark) return;
    --record(parent).children;
    slot = parent;
  }
}

void PrefixIndex::insert(std::vector<Entry>& table, Entry entry) const {
  const std::size_t mask = table.size() - 1;
  std::size_t at = home(static_cast<uint32_t>(entry >> 32));
  while (static_cast<Slot>(table[at]) != kNone) at = (at + 1) & mask;
  table[at] = entry;
}

void PrefixIndex::erase(Slot slot) {
  std::size_t hole = home(tag_of(record(slot).hash));
  while (static_cast<Slot>(table_[hole]) != slot) hole = (hole + 1) & mask_;
  // Entries behind move up as far as where they belong, so that no mark has to stay here.
  for (std::size_t at = (hole + 1) & mask_; static_cast<Slot>(table_[at]) != kNone; at = (at + 1) & mask_) {
    const std::size_t belongs = home(static_cast<uint32_t>(table_[at] >> 32));
    if (((at - belongs) & mask_) >= ((at - hole) & mask_)) {
      table_[hole] = table_[at];
      hole = at;
    }
  }
  table_[hole] = kEmpty;
}

void PrefixIndex::grow_table() {
  std::vector<Entry> larger(table_.size() * 2, kEmpty);
  --shift_;
  for (const Entry entry : table_) {
    if (static_cast<Slot>(entry) != kNone) insert(larger, entry);
  }
  table_.swap(larger);
  mask_ = table_.size() - 1;
}

void PrefixIndex::check_integrity() const {
  const auto fail = [](const std::string& what) { throw std::runtime_error("The prefix index is broken: " + what); };
  std::vector<uint32_t> children(holders_.size(), 0);
  int64_t count = 0, num_roots = 0;
  for (Slot slot = 0; slot < holders_.size(); ++slot) {
    Record& r = record(slot);
    if (r.parent == kFreeMark) continue;
    ++count;
    if (r.parent == kRootMark) {
      ++num_roots;
      if (!salts_.contains(slot)) fail("the root " + str(name_of(slot)) + " has no salt.");
      continue;
    }
    if (r.parent >= holders_.size() || record(r.parent).parent == kFreeMark) {
      fail("node " + str(name_of(slot)) + " has a parent that was removed.");
    }
    ++children[r.parent];
    if (find(r.parent, r.hash, tokens_of(r)) != slot) fail("node " + str(name_of(slot)) + " cannot be found.");
  }
  for (Slot slot = 0; slot < holders_.size(); ++slot) {
    const Record& r = record(slot);
    if (r.parent != kFreeMark && r.children != children[slot]) {
      fail("node " + str(name_of(slot)) + " has " + str(children[slot]) + " children and counts " + str(r.children) +
           ".");
    }
  }
  const auto entries =
      std::count_if(table_.begin(), table_.end(), [](Entry entry) { return static_cast<Slot>(entry) != kNone; });
  if (count != num_nodes_ || entries != count - num_roots || roots_.size() != static_cast<std::size_t>(num_roots)) {
    fail("it counts " + str(num_nodes_) + " nodes, and has " + str(count) + ", " + str(entries) + " of them in the " +
         "table and " + str(static_cast<int64_t>(roots_.size())) + " as roots.");
  }
}

}  // namespace nf
