// What glibc got after 2.28 and a static libstdc++ uses, for a library that must load there
// (FlashuOldGlibc.cmake).
#include <sys/random.h>
#include <sys/stat.h>

#include <cstdint>

extern "C" {

// glibc 2.32: libstdc++'s headers count references without atomics where it is not 0. There may be threads.
char __libc_single_threaded = 0;

// glibc 2.33 made functions of what had been inline calls of this one. 1 is the layout of x86_64's struct
// stat.
int __fxstat64(int version, int file, struct stat64* out);
int fstat64(int file, struct stat64* out) noexcept { return __fxstat64(1, file, out); }

// glibc 2.36. For std::random_device, which nothing here makes.
uint32_t arc4random() noexcept {
  uint32_t number = 0;
  while (getrandom(&number, sizeof number, 0) != sizeof number) {
  }
  return number;
}
}
