/*
 * A small trace-driven simulator in the manner of ChampSim: a core that issues loads and stores, a two-level TLB, a
 * page-table walker, an L1 and an L2 cache in front of DRAM, each with a latency. What ChampSim calls its virtual
 * memory and page-table walker is the engine here: behind the interface `translator` stands an MMU under a hypervisor,
 * natively or by shadow paging, whose page tables the guest edits while it runs.
 *
 * The engine needs no Python.h in this file: main.c, which embeds Python, hands the table of functions over.
 */
#include <shadowcore.h>

#include <array>
#include <cstdio>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using address = std::uint64_t;
using cycles = std::uint64_t;

/* What the core needs to know of an address. */
struct translation {
    address physical;
    unsigned page_shift;
    bool writable;
    cycles latency; /* of the walk, with the exits that it took */
};

/* The interface that a page-table walker has in the simulator. */
class translator {
  public:
    virtual ~translator() = default;
    virtual translation walk(address virtual_address, bool store) = 0;
    virtual void context_switch(unsigned space) = 0;
};

struct vm_error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/* A guest with two address spaces of `pages` pages each that share their frames. */
class shadow_mmu final : public translator {
  public:
    static constexpr std::size_t page = 4096, ram_size = 32u << 20;
    static constexpr address data = 0x10000000;

    shadow_mmu(const sc_api &api, std::uint32_t design, unsigned pages)
        : api_{api}, ram_{static_cast<unsigned char *>(::operator new(ram_size, std::align_val_t{page}))} {
        std::memset(ram_.get(), 0, ram_size);
        for (unsigned space = 0; space < 2; space++)
            roots_[space] = make_tables(pages);
        sc_config config;
        SC_INIT(&config);
        config.design = design;
        config.memory = ram_.get();
        config.memory_size = ram_size;
        check(api_.vm_create(&config, &vm_));
        check(api_.register_load(vm_, 0, SC_EFER, 0x900));
        check(api_.register_load(vm_, 0, SC_CR4, 0x20));
        check(api_.register_load(vm_, 0, SC_CR3, roots_[0]));
        check(api_.register_load(vm_, 0, SC_CR0, 0x80010011));
        sc_prices prices;
        SC_INIT(&prices);
        check(api_.prices("modern", &prices));
        check(api_.set_prices(vm_, &prices));
        check(api_.on_event(vm_, SC_EVENT_MASK(SC_EVENT_FLUSH) | SC_EVENT_MASK(SC_EVENT_EXIT), on_event, this));
    }
    ~shadow_mmu() override { api_.vm_destroy(vm_); }
    shadow_mmu(const shadow_mmu &) = delete;
    shadow_mmu &operator=(const shadow_mmu &) = delete;

    translation walk(address virtual_address, bool store) override {
        sc_access access;
        sc_outcome outcome;
        SC_INIT(&access);
        SC_INIT(&outcome);
        access.gva = virtual_address;
        access.kind = store ? SC_WRITE : SC_READ;
        access.size = 8;
        access.user = 1;
        check(api_.access(vm_, &access, &outcome));
        return {outcome.hpa, outcome.page_shift, store, outcome.cycles};
    }

    void context_switch(unsigned space) override { check(api_.register_load(vm_, 0, SC_CR3, roots_[space])); }

    sc_counters counters() const {
        sc_counters found;
        SC_INIT(&found);
        check(api_.counters(vm_, &found));
        return found;
    }
    std::uint32_t violations() const {
        sc_audit_result result;
        SC_INIT(&result);
        check(api_.audit(vm_, &result));
        return result.violations;
    }
    unsigned long flushes = 0, exits = 0;

  private:
    static void on_event(void *context, const sc_event *event) noexcept {
        auto *self = static_cast<shadow_mmu *>(context);
        (event->kind == SC_EVENT_FLUSH ? self->flushes : self->exits)++;
    }

    void check(int rc) const {
        if (rc != SC_OK)
            throw vm_error(rc < 0 ? api_.last_error() : "the guest faults, code " + std::to_string(rc));
    }

    address take() { return page * next_++; }
    std::uint64_t *table(address at) { return reinterpret_cast<std::uint64_t *>(ram_.get() + at); }

    address make_tables(unsigned pages) {
        address root = take();
        for (unsigned i = 0; i < pages; i++) {
            address at = root, va = data + page * i;
            for (unsigned level = 4; level > 1; level--) {
                std::uint64_t &entry = table(at)[(va >> (3 + 9 * level)) & 511];
                if (entry == 0)
                    entry = take() | 7;
                at = entry & ~static_cast<address>(0xFFF);
            }
            table(at)[(va >> 12) & 511] = (ram_size / 2 + page * i) | 0x67;
        }
        return root;
    }

    struct release {
        void operator()(unsigned char *at) const { ::operator delete(at, std::align_val_t{page}); }
    };
    const sc_api &api_;
    std::unique_ptr<unsigned char, release> ram_;
    sc_vm vm_ = 0;
    address next_ = 1;
    std::array<address, 2> roots_{};
};

/* Set-associative, replaces the least recently used. */
template <typename Value> class lru_table {
  public:
    lru_table(std::size_t sets, std::size_t ways) : ways_{ways}, entries_(sets * ways) {}

    Value *find(address tag) {
        for (auto *e = set(tag), *end = e + ways_; e != end; ++e)
            if (e->valid && e->tag == tag) {
                e->used = ++clock_;
                return &e->value;
            }
        return nullptr;
    }
    void fill(address tag, const Value &value) {
        auto *victim = set(tag);
        for (auto *e = victim, *end = e + ways_; e != end; ++e)
            if (!e->valid || e->used < victim->used)
                victim = e;
        *victim = {tag, ++clock_, true, value};
    }
    void clear() {
        for (auto &e : entries_)
            e.valid = false, e.used = 0;
    }

  private:
    struct entry {
        address tag = 0;
        std::uint64_t used = 0;
        bool valid = false;
        Value value{};
    };
    entry *set(address tag) { return &entries_[tag % (entries_.size() / ways_) * ways_]; }
    std::size_t ways_;
    std::vector<entry> entries_;
    std::uint64_t clock_ = 0;
};

class cache {
  public:
    cache(std::string name, std::size_t sets, std::size_t ways, cycles latency, cache *lower)
        : name_{std::move(name)}, lines_{sets, ways}, latency_{latency}, lower_{lower} {}

    cycles access(address physical) {
        const address line = physical >> 6;
        if (lines_.find(line) != nullptr) {
            hits++;
            return latency_;
        }
        misses++;
        lines_.fill(line, {});
        return latency_ + (lower_ != nullptr ? lower_->access(physical) : dram_latency);
    }
    void report() const { std::printf("  %-4s %8lu hits %8lu misses\n", name_.c_str(), hits, misses); }
    unsigned long hits = 0, misses = 0;

  private:
    static constexpr cycles dram_latency = 200;
    struct nothing {};
    std::string name_;
    lru_table<nothing> lines_;
    cycles latency_;
    cache *lower_;
};

class tlb {
  public:
    tlb(translator &walker, const unsigned long &flushes) : walker_{walker}, flushes_{flushes} {}

    translation translate(address va, bool store, cycles &time) {
        if (seen_ != flushes_) { /* the MMU withdrew something: what we hold may be stale */
            seen_ = flushes_;
            flush();
        }
        const address page = va >> 12;
        for (auto *level : {&first_, &second_}) {
            time += level == &first_ ? 1 : 7;
            if (const auto *found = level->find(page); found != nullptr && (found->writable || !store)) {
                hits++;
                translation t = *found;
                t.physical |= va & 0xFFF;
                return t;
            }
        }
        misses++;
        translation t = walker_.walk(va, store);
        time += t.latency;
        t.physical &= ~static_cast<address>(0xFFF);
        first_.fill(page, t);
        second_.fill(page, t);
        t.physical |= va & 0xFFF;
        return t;
    }
    void flush() {
        first_.clear();
        second_.clear();
    }
    unsigned long hits = 0, misses = 0;

  private:
    translator &walker_;
    const unsigned long &flushes_;
    unsigned long seen_ = 0;
    lru_table<translation> first_{16, 4}, second_{128, 12};
};

/* A trace: runs through memory with a stride that changes, now and then a switch of address spaces. */
void simulate(const sc_api &api, const char *name, std::uint32_t design) {
    constexpr unsigned pages = 1024, accesses = 400000, slice = 20000;
    shadow_mmu mmu{api, design, pages};
    cache l2{"L2", 1024, 8, 10, nullptr}, l1{"L1D", 64, 12, 5, &l2};
    tlb dtlb{mmu, mmu.flushes};
    cycles time = 0;
    std::uint64_t random = 88172645463325252u;
    for (unsigned i = 0; i < accesses; i++) {
        if (i != 0 && i % slice == 0) {
            mmu.context_switch((i / slice) % 2);
            dtlb.flush();
        }
        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        const address offset = i % 4 != 0 ? 8u * i : random;
        const bool store = random % 5 == 0;
        const translation t = dtlb.translate(shadow_mmu::data + offset % (pages * shadow_mmu::page) / 8 * 8, store, time);
        time += l1.access(t.physical);
    }
    const sc_counters counters = mmu.counters();
    std::printf("%s: %.2f cycles per access\n", name, static_cast<double>(time) / accesses);
    std::printf("  TLB  %8lu hits %8lu misses\n", dtlb.hits, dtlb.misses);
    l1.report();
    l2.report();
    std::printf("  MMU  %8llu walks %7llu page-fault exits, %lu exits told as events, %u violations\n",
                static_cast<unsigned long long>(counters.accesses), static_cast<unsigned long long>(counters.pf_taken),
                mmu.exits, mmu.violations());
    if (counters.accesses != dtlb.misses || mmu.violations() != 0)
        throw vm_error("the counters do not add up");
}

} // namespace

extern "C" int simulator_main(const sc_api *api) {
    if (sc_api_fits(api) == 0)
        return 2;
    try {
        simulate(*api, "native", SC_NATIVE);
        simulate(*api, "flush", SC_FLUSH);
        simulate(*api, "cached", SC_CACHED);
    } catch (const std::exception &error) {
        std::fprintf(stderr, "simulator: %s\n", error.what());
        return 1;
    }
    return 0;
}
