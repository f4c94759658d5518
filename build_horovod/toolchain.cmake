# Given to CMake as CMAKE_TOOLCHAIN_FILE, so that Horovod's source builds unchanged.
# A toolchain file is read before project(), too early for the standard; it only names what runs right after.
set(CMAKE_PROJECT_INCLUDE "${CMAKE_CURRENT_LIST_DIR}/cxx_standard.cmake")
