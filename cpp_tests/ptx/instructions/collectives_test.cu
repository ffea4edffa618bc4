// What lanes of a warp and threads of a block do together: shfl, vote, match, redux, elect, barriers,
// mbarriers.
#include "device.cuh"

namespace flashu::test {
namespace {

Words count_from(uint32_t first) {
  Words w(32);
  for (uint32_t l = 0; l < 32; ++l) w[l] = first + l;
  return w;
}

// ---- shfl: every lane has its number; 100 is added where the source is out of range.

#define FLASHU_SHFL(name, mode, by, clamp)                                           \
  struct name {                                                                      \
    __device__ uint32_t operator()(int lane) const {                                 \
      uint32_t d;                                                                    \
      asm volatile("{ .reg .pred p; shfl.sync." mode ".b32 %0|p, %1, " by ", " clamp \
                   ", -1; @!p add.u32 %0, %0, 100; }"                                \
                   : "=r"(d)                                                         \
                   : "r"(lane));                                                     \
      return d;                                                                      \
    }                                                                                \
  }
FLASHU_SHFL(Up2, "up", "2", "0");
FLASHU_SHFL(Down2, "down", "2", "31");
FLASHU_SHFL(Xor5, "bfly", "5", "31");
FLASHU_SHFL(From3, "idx", "3", "31");
FLASHU_SHFL(From3Of8, "idx", "3", "0x181f");  // segments of eight lanes
FLASHU_SHFL(Down2Of8, "down", "2", "0x181f");
FLASHU_SHFL(Up2Of8, "up", "2", "0x1800");

TEST(Shfl, WholeWarp) {
  Words up = count_from(0), down = count_from(2);
  for (uint32_t l = 0; l < 32; ++l) {
    up[l] = l < 2 ? l + 100 : l - 2;
    down[l] = l >= 30 ? l + 100 : l + 2;
  }
  EXPECT_EQ(on_threads(Up2{}), up);
  EXPECT_EQ(on_threads(Down2{}), down);
  EXPECT_EQ(on_threads(Xor5{}), (Words{5,  4,  7,  6,  1,  0,  3,  2,  13, 12, 15, 14, 9,  8,  11, 10,
                                       21, 20, 23, 22, 17, 16, 19, 18, 29, 28, 31, 30, 25, 24, 27, 26}));
  EXPECT_EQ(on_threads(From3{}), Words(32, 3));
}

TEST(Shfl, SegmentsOfEight) {
  EXPECT_EQ(on_threads(From3Of8{}), (Words{3,  3,  3,  3,  3,  3,  3,  3,  11, 11, 11, 11, 11, 11, 11, 11,
                                           19, 19, 19, 19, 19, 19, 19, 19, 27, 27, 27, 27, 27, 27, 27, 27}));
  EXPECT_EQ(on_threads(Down2Of8{}),
            (Words{2,  3,  4,  5,  6,  7,  106, 107, 10, 11, 12, 13, 14, 15, 114, 115,
                   18, 19, 20, 21, 22, 23, 122, 123, 26, 27, 28, 29, 30, 31, 130, 131}));
  EXPECT_EQ(on_threads(Up2Of8{}),
            (Words{100, 101, 0,  1,  2,  3,  4,  5,  108, 109, 8,  9,  10, 11, 12, 13,
                   116, 117, 16, 17, 18, 19, 20, 21, 124, 125, 24, 25, 26, 27, 28, 29}));
}

// ---- votes and reductions, of lanes for which `lane % 3 == 0` holds

#define FLASHU_VOTE(name, text)                                                                      \
  struct name {                                                                                      \
    __device__ uint32_t operator()(int lane) const {                                                 \
      uint32_t d;                                                                                    \
      asm volatile("{ .reg .pred p, q; setp.eq.u32 p, %1, 0; " text " }" : "=r"(d) : "r"(lane % 3)); \
      return d;                                                                                      \
    }                                                                                                \
  }
FLASHU_VOTE(Ballot, "vote.sync.ballot.b32 %0, p, -1;");
FLASHU_VOTE(Any, "vote.sync.any.pred q, p, -1; selp.u32 %0, 1, 0, q;");
FLASHU_VOTE(All, "vote.sync.all.pred q, p, -1; selp.u32 %0, 1, 0, q;");
FLASHU_VOTE(Uniform, "vote.sync.uni.pred q, p, -1; selp.u32 %0, 1, 0, q;");

TEST(Vote, OfAllLanes) {
  EXPECT_EQ(on_threads(Ballot{}), Words(32, 0x49249249u));
  EXPECT_EQ(on_threads(Any{}), Words(32, 1));
  EXPECT_EQ(on_threads(All{}), Words(32, 0));
  EXPECT_EQ(on_threads(Uniform{}), Words(32, 0));
}

#define FLASHU_OF_LANE(name, text, value)                             \
  struct name {                                                       \
    __device__ uint32_t operator()(int lane) const {                  \
      uint32_t d;                                                     \
      asm volatile("{ " text " }" : "=r"(d) : "r"(value), "r"(lane)); \
      return d;                                                       \
    }                                                                 \
  }
FLASHU_OF_LANE(Sum, "redux.sync.add.u32 %0, %1, -1;", lane);
FLASHU_OF_LANE(Least, "redux.sync.min.s32 %0, %1, -1;", lane - 5);
FLASHU_OF_LANE(Most, "redux.sync.max.u32 %0, %1, -1;", lane - 5);
FLASHU_OF_LANE(Exclusive, "redux.sync.xor.b32 %0, %1, -1;", 1 << lane);
FLASHU_OF_LANE(MatchAny, "match.any.sync.b32 %0, %1, -1;", lane / 16);
FLASHU_OF_LANE(MatchAll, "{ .reg .pred p; match.all.sync.b32 %0|p, %1, -1; @!p mov.u32 %0, 7; }", lane / 16);
FLASHU_OF_LANE(Elect, "{ .reg .pred p; elect.sync %0|p, -1; @p add.u32 %0, %0, 50; }", lane);

TEST(Redux, OfAllLanes) {
  EXPECT_EQ(on_threads(Sum{}), Words(32, 496));
  EXPECT_EQ(on_threads(Least{}), Words(32, 0xfffffffbu));
  EXPECT_EQ(on_threads(Most{}), Words(32, 0xffffffffu));
  EXPECT_EQ(on_threads(Exclusive{}), Words(32, 0xffffffffu));
}

TEST(Match, LanesWithTheSameValue) {
  Words halves(32, 0xffff0000u);
  std::fill_n(halves.begin(), 16, 0xffffu);
  EXPECT_EQ(on_threads(MatchAny{}), halves);
  EXPECT_EQ(on_threads(MatchAll{}), Words(32, 7));
}

// Which lane is elected is not specified; all are told the same one, and one finds itself elected.
TEST(Elect, OneLane) {
  const Words got = on_threads(Elect{});
  int elected = 0;
  for (uint32_t l = 0; l < 32; ++l) elected += got[l] >= 50 ? 1 : 0;
  EXPECT_EQ(elected, 1);
  for (uint32_t l = 0; l < 32; ++l) EXPECT_EQ(got[l] % 50, got[0] % 50);
}

// ---- barriers of a block

// Warps 0 and 1 meet at barrier 1, then all four at barrier 0 with a reduction.
struct Meet {
  __device__ uint32_t operator()(int thread) const {
    __shared__ uint32_t seen[64];
    uint32_t other = 0, d;
    if (thread < 64) {
      seen[thread] = static_cast<uint32_t>(thread);
      asm volatile("bar.sync 1, 64;" ::: "memory");
      other = seen[63 - thread];
    }
    asm volatile("{ .reg .pred p; setp.lt.u32 p, %1, 100; bar.red.popc.u32 %0, 0, p; }"
                 : "=r"(d)
                 : "r"(thread)
                 : "memory");
    return d * 1000 + other;
  }
};

TEST(Barrier, OfAPartAndWithAReduction) {
  Words want(128, 100000);
  for (uint32_t t = 0; t < 64; ++t) want[t] += 63 - t;
  EXPECT_EQ(on_threads(Meet{}, 128), want);
}

// ---- mbarriers

// One bit for each question, in order.
struct Phases {
  __device__ uint32_t operator()(int thread) const {
    __shared__ uint64_t barrier;
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(&barrier));
    uint32_t answers = 0;
    int asked = 0;
    const auto ask = [&](uint32_t parity) {
      uint32_t done;
      asm volatile(
          "{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
          : "=r"(done)
          : "r"(at), "r"(parity)
          : "memory");
      answers |= done << asked++;
    };
    const auto arrive = [&] {
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
    };
    if (thread == 0) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 2;" ::"r"(at) : "memory");
      ask(0);  // phase 0 is not complete
      ask(1);  // and the one before counts as complete
      arrive();
      ask(0);
      arrive();
      ask(0);  // both have arrived
      ask(1);
      arrive();  // of the next phase, with bytes
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 16;" ::"r"(at) : "memory");
      ask(1);  // bytes are missing
      asm volatile("mbarrier.complete_tx.shared::cta.relaxed.cta.b64 [%0], 16;" ::"r"(at) : "memory");
      ask(1);
      ask(0);
      asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(at) : "memory");
    }
    return answers;
  }
};

TEST(Mbarrier, PhasesOfArrivalsAndBytes) {
  Words want(32, 0);
  want[0] = 0b01001010u;  // from the last question down: no, yes, no, no, yes, no, yes, no
  EXPECT_EQ(on_threads(Phases{}), want);
}

}  // namespace
}  // namespace flashu::test
