# flashu_old_glibc(TARGET EXPORTED...): links TARGET so that it loads on systems of manylinux_2_28 (glibc 2.28, GCC 8's
# libstdc++). EXPORTED: patterns of the symbols that it exports; nothing else of it is seen by the process.
#
# - libstdc++ is linked statically, but for the functions that throw and catch: a thread's exceptions are counted in one place,
#   also those that cross libraries.
# - glibc 2.34 moved what was in libpthread, libdl and librt into libc and gave it the version GLIBC_2.34. The old versions
#   are still there, in the old libraries' names. A linker takes the first library that has a symbol, so stubs with the
#   old names and versions come before libc. They are not needed at run time: the real ones are in every glibc.
#   A symbol below has the version GLIBC_2.2.5 or the one after its @.
# - What newer glibcs added and libstdc++ or its headers use, TARGET has itself (old_glibc.cpp beside this file).
set(FLASHU_GLIBC_pthread
    pthread_condattr_setpshared pthread_create pthread_detach pthread_getspecific pthread_join pthread_key_create
    pthread_key_delete pthread_kill pthread_mutex_trylock pthread_mutexattr_destroy pthread_mutexattr_init
    pthread_mutexattr_setpshared pthread_mutexattr_settype pthread_once pthread_rwlock_destroy pthread_rwlock_init
    pthread_rwlock_rdlock pthread_rwlock_timedrdlock pthread_rwlock_timedwrlock pthread_rwlock_tryrdlock
    pthread_rwlock_trywrlock pthread_rwlock_unlock pthread_rwlock_wrlock pthread_rwlockattr_destroy
    pthread_rwlockattr_init pthread_rwlockattr_setpshared pthread_setspecific pthread_spin_destroy pthread_spin_init
    pthread_spin_lock pthread_spin_trylock pthread_spin_unlock sem_destroy sem_init sem_post sem_timedwait sem_trywait
    sem_wait)
set(FLASHU_GLIBC_dl dlclose dlerror dlopen dlsym dlvsym dlmopen@GLIBC_2.3.4)
set(FLASHU_GLIBC_rt shm_open shm_unlink)
set(FLASHU_GLIBC_stdcxx
    __cxa_allocate_exception@CXXABI_1.3 __cxa_begin_catch@CXXABI_1.3 __cxa_current_exception_type@CXXABI_1.3
    __cxa_end_catch@CXXABI_1.3 __cxa_free_exception@CXXABI_1.3 __cxa_get_globals@CXXABI_1.3
    __cxa_get_globals_fast@CXXABI_1.3 __cxa_rethrow@CXXABI_1.3 __cxa_throw@CXXABI_1.3 __gxx_personality_v0@CXXABI_1.3
    _ZSt18uncaught_exceptionv@GLIBCXX_3.4 _ZSt19uncaught_exceptionsv@GLIBCXX_3.4.22)
set(FLASHU_SONAME_pthread libpthread.so.0)
set(FLASHU_SONAME_dl libdl.so.2)
set(FLASHU_SONAME_rt librt.so.1)
set(FLASHU_SONAME_stdcxx libstdc++.so.6)

function(flashu_old_glibc target)
  set(folder ${CMAKE_CURRENT_BINARY_DIR}/old_glibc)
  set(exported "")
  if(ARGN)
    list(JOIN ARGN "; " exported)
    set(exported "global: ${exported}; ")
  endif()
  file(CONFIGURE OUTPUT ${folder}/${target}.map CONTENT "{ ${exported}local: *; };\n")
  # Without names and what nothing reaches, which is half of libstdc++: a wheel has a limit.
  target_link_options(${target} PRIVATE -static-libstdc++ -Wl,--version-script=${folder}/${target}.map -Wl,--gc-sections,--strip-all)
  set_property(TARGET ${target} APPEND PROPERTY LINK_DEPENDS ${folder}/${target}.map)
  if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
    return() # the versions are those of x86_64; the checks say what is missing
  endif()
  target_sources(${target} PRIVATE csrc/cmake/old_glibc.cpp)
  foreach(name IN ITEMS pthread dl rt stdcxx)
    set(stub flashu_glibc_${name})
    if(NOT TARGET ${stub})
      set(code "")
      set(versions "")
      foreach(symbol IN LISTS FLASHU_GLIBC_${name})
        string(REGEX MATCH "^[^@]+" function "${symbol}")
        set(version GLIBC_2.2.5)
        if(symbol MATCHES "@(.+)$")
          set(version ${CMAKE_MATCH_1})
        endif()
        string(APPEND code "void ${function}(void) {}\n")
        list(APPEND versions ${version})
        list(APPEND of_${version} ${function})
      endforeach()
      list(REMOVE_DUPLICATES versions)
      set(map "")
      foreach(version IN LISTS versions)
        list(JOIN of_${version} "; " symbols)
        string(APPEND map "${version} { global: ${symbols}; };\n")
        unset(of_${version})
      endforeach()
      file(CONFIGURE OUTPUT ${folder}/${name}.cpp CONTENT "extern \"C\" {\n${code}}\n")
      file(CONFIGURE OUTPUT ${folder}/${name}.map CONTENT "${map}")
      add_library(${stub} SHARED EXCLUDE_FROM_ALL ${folder}/${name}.cpp)
      set_target_properties(${stub} PROPERTIES NO_SONAME ON CXX_VISIBILITY_PRESET default LIBRARY_OUTPUT_DIRECTORY ${folder}
                                               LINK_DEPENDS ${folder}/${name}.map)
      target_link_options(${stub} PRIVATE -nostdlib -Wl,-soname,${FLASHU_SONAME_${name}} -Wl,--version-script=${folder}/${name}.map)
    endif()
    add_dependencies(${target} ${stub})
    set_property(TARGET ${target} APPEND PROPERTY LINK_DEPENDS $<TARGET_FILE:${stub}>)
    # Options come before the objects; a library that is linked only as needed would not be needed there yet.
    target_link_options(${target} PRIVATE -Wl,--push-state,--no-as-needed,$<TARGET_FILE:${stub}>,--pop-state)
  endforeach()
endfunction()
