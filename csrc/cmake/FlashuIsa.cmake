# flashu_isa_sources(TARGET file...): compiles each kernel file once per CPU instruction set into TARGET.
# A copy sees FLASHU_ISA (its namespace, one of FLASHU_ISAS) and the matching machine flags; the dispatcher in
# csrc/core/isa.hpp picks one at run time.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  set(FLASHU_ISAS baseline avx2 avx512 avx512_bf16)
else()
  set(FLASHU_ISAS baseline)
endif()
set(FLASHU_FLAGS_baseline "")
set(FLASHU_FLAGS_avx2 -mavx2 -mfma -mf16c)
# GCC 12 warns about its own headers (_mm512_cvtph_ps, _mm512_reduce_add_ps).
set(FLASHU_FLAGS_avx512 -Wno-maybe-uninitialized -Wno-uninitialized -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
set(FLASHU_FLAGS_avx512_bf16 ${FLASHU_FLAGS_avx512} -mavx512bf16 -mavx512vnni)

# Sanitizers multiply what the unrolled tiles are; at -O3 one such file takes minutes to compile.
if(FLASHU_SANITIZE)
  set(FLASHU_KERNEL_LEVEL -O1)
else()
  set(FLASHU_KERNEL_LEVEL -O3)
endif()

function(flashu_isa_sources target)
  foreach(isa IN LISTS FLASHU_ISAS)
    set(copy ${target}_${isa})
    if(NOT TARGET ${copy})
      add_library(${copy} OBJECT)
      target_compile_definitions(${copy} PRIVATE FLASHU_ISA=${isa})
      # Reassociation stays off (results are promised); contraction gives FMA where the set has it.
      target_compile_options(${copy} PRIVATE ${FLASHU_FLAGS_${isa}} ${FLASHU_KERNEL_LEVEL} -ffp-contract=fast -fno-math-errno
                                             -fno-trapping-math)
      target_link_libraries(${copy} PRIVATE flashu_flags)
      target_sources(${target} PRIVATE $<TARGET_OBJECTS:${copy}>)
    endif()
    target_sources(${copy} PRIVATE ${ARGN})
  endforeach()
endfunction()
