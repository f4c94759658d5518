# Horovod 0.28.1 asks for C++14 after everything else; torch 2.13 asks its extensions for C++20.
# Whichever standard a target asks for, the compiler is told 20.
foreach(standard 11 14 17)
  set(CMAKE_CXX${standard}_STANDARD_COMPILE_OPTION "-std=gnu++20")
  set(CMAKE_CXX${standard}_EXTENSION_COMPILE_OPTION "-std=gnu++20")
endforeach()
set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O2 -DNDEBUG -w")  # no debug symbols: a 1 MB wheel, and much less memory to link it
