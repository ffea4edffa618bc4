# flashu_old_glibc(TARGET): links TARGET so that it loads on systems of manylinux_2_28 (glibc 2.28, GCC 8's libstdc++).
#
# - libstdc++ is linked statically; nothing of TARGET is exported, so the process keeps two copies apart.
# - glibc 2.34 moved what was in libpthread, libdl and librt into libc and gave it the version GLIBC_2.34. The old versions
#   are still there, in the old libraries' names. A linker takes the first library that has a symbol, so stubs with the
#   old names and versions come before libc. They are not needed at run time: the real ones are in every glibc.
# - What newer glibcs added and libstdc++ or its headers use, TARGET has itself (old_glibc.cpp).
set(FLASHU_GLIBC_pthread
    pthread_condattr_setpshared pthread_create pthread_detach pthread_getspecific pthread_join pthread_key_create
    pthread_key_delete pthread_kill pthread_mutex_trylock pthread_mutexattr_destroy pthread_mutexattr_init
    pthread_mutexattr_setpshared pthread_mutexattr_settype pthread_once pthread_rwlock_destroy pthread_rwlock_init
    pthread_rwlock_rdlock pthread_rwlock_timedrdlock pthread_rwlock_timedwrlock pthread_rwlock_tryrdlock
    pthread_rwlock_trywrlock pthread_rwlock_unlock pthread_rwlock_wrlock pthread_rwlockattr_destroy
    pthread_rwlockattr_init pthread_rwlockattr_setpshared pthread_setspecific pthread_spin_destroy pthread_spin_init
    pthread_spin_lock pthread_spin_trylock pthread_spin_unlock sem_destroy sem_init sem_post sem_timedwait sem_trywait
    sem_wait)
set(FLASHU_GLIBC_dl dlclose dlerror dlopen dlsym dlvsym dlmopen)
set(FLASHU_GLIBC_rt shm_open shm_unlink)
set(FLASHU_SONAME_pthread libpthread.so.0)
set(FLASHU_SONAME_dl libdl.so.2)
set(FLASHU_SONAME_rt librt.so.1)

function(flashu_old_glibc target)
  set(folder ${CMAKE_CURRENT_BINARY_DIR}/old_glibc)
  target_link_options(${target} PRIVATE -static-libstdc++ -Wl,--version-script=${folder}/nothing.map)
  file(WRITE ${folder}/nothing.map "{ local: *; };\n")
  if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
    return() # the versions are those of x86_64; .ci/kernels-hub says what is missing
  endif()
  target_sources(${target} PRIVATE csrc/torch/hub/old_glibc.cpp)
  foreach(name IN ITEMS pthread dl rt)
    set(stub flashu_glibc_${name})
    set(symbols ${FLASHU_GLIBC_${name}})
    list(TRANSFORM symbols REPLACE ".+" "void \\0(void) {}" OUTPUT_VARIABLE code)
    list(JOIN code "\n" code)
    set(map "")
    if("dlmopen" IN_LIST symbols)
      list(REMOVE_ITEM symbols dlmopen)
      set(map "GLIBC_2.3.4 { global: dlmopen; };\n")
    endif()
    list(JOIN symbols "; " symbols)
    string(APPEND map "GLIBC_2.2.5 { global: ${symbols}; };\n")
    file(CONFIGURE OUTPUT ${folder}/${name}.cpp CONTENT "extern \"C\" {\n${code}\n}\n")
    file(CONFIGURE OUTPUT ${folder}/${name}.map CONTENT "${map}")
    add_library(${stub} SHARED EXCLUDE_FROM_ALL ${folder}/${name}.cpp)
    set_target_properties(${stub} PROPERTIES NO_SONAME ON CXX_VISIBILITY_PRESET default LIBRARY_OUTPUT_DIRECTORY ${folder})
    target_link_options(${stub} PRIVATE -nostdlib -Wl,-soname,${FLASHU_SONAME_${name}} -Wl,--version-script=${folder}/${name}.map)
    add_dependencies(${target} ${stub})
    # Options come before the objects; a library that is linked only as needed would not be needed there yet.
    target_link_options(${target} PRIVATE -Wl,--push-state,--no-as-needed,$<TARGET_FILE:${stub}>,--pop-state)
  endforeach()
endfunction()
