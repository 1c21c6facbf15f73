# GPTCORE_SANITIZE: address makes _C under AddressSanitizer and UndefinedBehaviorSanitizer, where a failure ends the
# process; thread makes the driver in tests/cpp under ThreadSanitizer. .ci/sanitize runs both.
#
# A build type of its own, since the options of Release would follow and win. Two instruction sets, which between
# them take every branch of the bodies but AMX's, whose tiles sanitizers do not see; of AMX, how it shares out work.
set(CMAKE_BUILD_TYPE Sanitize)
if(NOT GPTCORE_ISAS)
  set(GPTCORE_ISAS v3 v4_bf16)
  if(GPTCORE_SANITIZE STREQUAL "thread")
    list(APPEND GPTCORE_ISAS amx)
  endif()
  if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    set(GPTCORE_ISAS v2)
  endif()
endif()
if(GPTCORE_SANITIZE STREQUAL "address")
  set(GPTCORE_SANITIZERS -fsanitize=address,undefined -fno-sanitize-recover=all)
elseif(GPTCORE_SANITIZE STREQUAL "thread")
  set(GPTCORE_SANITIZERS -fsanitize=thread)
else()
  message(FATAL_ERROR "GPTCORE_SANITIZE: got '${GPTCORE_SANITIZE}', expected address, thread or OFF")
endif()
add_compile_options(-O1 -g1 -fno-omit-frame-pointer ${GPTCORE_SANITIZERS})
add_link_options(${GPTCORE_SANITIZERS})
